"""A sweep file: one recipe and what varies, expanded to named recipes.

    name: n-of-8-tiny
    recipe: ../tiny/base.yaml                   relative to the sweep file
    set: {training.steps: 60}                   for all of them; may be left out
    axes:
      format:                                   an axis of named variants, each some keys and values
        ternary: {linear.weight_format: ternary}
        bf16: {linear.weight_format: dense, model.bf16: true}
      linear.sparsity: ["8:8", "6:8"]           an axis of one key and its values

Every combination is a recipe, named NAME-VARIANT-VALUE-..., in the order of the axes with the last varying fastest, so
that a number names the same recipe for ever. All are children of one MLflow run, the study's, named NAME unless
`tracking.study` is set. The key `ranks` is no recipe key: the number of ranks that the combination
is meant for. Imports no torch.
"""

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from megatron_sbn.config import Name, Recipe, Section, load_recipe
from megatron_sbn.config.validation import min_world_size, validate_world_size
from megatron_sbn.config.yaml_file import find_recipe, override_of, parse_yaml, read_recipe, read_text
from megatron_sbn.errors import RecipeError

Values = dict[str, Any]
RANKS = "ranks"
ITS_OWN = ("name", "run_dir")
MOST_RECIPES = 1000  # Slurm's arrays end there too, unless a site has set MaxArraySize
STUDY = "tracking.study"


class SweepFile(Section):
    """The file, as written."""

    name: Name
    recipe: str
    set: Annotated[Values, Field(default_factory=dict)]
    axes: Annotated[dict[str, list[Any] | dict[str, Values]], Field(min_length=1)]


@dataclass(frozen=True)
class Variant:
    """One recipe of a sweep.

    Attributes:
        name: of the run; unique in the sweep.
        labels: its value on every axis, by the axis' name.
        overrides: `section.key=value`, to be given after the recipe's path.
        ranks: how many it is meant for.
    """

    name: str
    labels: dict[str, str]
    overrides: tuple[str, ...]
    ranks: int
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """A study: its recipes, in order."""

    name: str
    base: Path
    variants: tuple[Variant, ...]


def load_sweep(path: str | Path) -> Sweep:
    """Reads and expands a sweep file; every recipe of it can be trained on its ranks. Raises RecipeError."""
    path = find_recipe(Path(path))
    file = _read(path)
    base = path.parent / file.recipe
    axes = [_axis(path, name, values) for name, values in file.axes.items()]
    count = math.prod(map(len, axes))
    if count > MOST_RECIPES:
        raise RecipeError(f"{path}: its axes make {count:,} recipes, at most {MOST_RECIPES:,}; give it fewer")
    variants = []
    for combination in itertools.product(*axes):
        labels = dict(zip(file.axes, (label for label, _ in combination), strict=True))
        values = {STUDY: file.name} | file.set
        for _, changes in combination:
            values |= changes
        variants.append(_variant(path, base, "-".join([file.name, *labels.values()]), labels, values))
    names = [variant.name for variant in variants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"{path}: two recipes would be called {twice}; give an axis' values different names")
    return Sweep(file.name, base, tuple(variants))


def frozen(path: Path) -> dict[str, str]:
    """Files to write into one folder, by name: the sweep, and its recipe with all that it extends. Raises RecipeError.

    `sweep.yaml` of that folder expands to what `path` does now, whatever becomes of the files that it was made of.
    """
    path = find_recipe(path)
    file = _read(path)
    base = read_recipe(path.parent / file.recipe, (), str)
    texts = {"sweep.yaml": file.model_dump() | {"recipe": "base.yaml"}, "base.yaml": base}
    return {name: yaml.safe_dump(values, sort_keys=False) for name, values in texts.items()}


def _read(path: Path) -> SweepFile:
    values = parse_yaml(read_text(path, "sweep"), str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a sweep is a mapping with the keys name, recipe, set and axes")
    try:
        return SweepFile.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise RecipeError(f"{path}: {field}: {' '.join(problem['msg'].split())}") from None


def _axis(path: Path, name: str, values: list[Any] | dict[str, Values]) -> list[tuple[str, Values]]:
    """(label, keys and values) of every point of an axis."""
    if not values:
        raise RecipeError(f"{path}: axes.{name} is empty; give it a value or leave it out")
    if isinstance(values, dict):
        return [(_label(path, name, label), changes) for label, changes in values.items()]
    return [(_label(path, name, f"{name.rpartition('.')[2]}-{value}"), {name: value}) for value in values]


def _label(path: Path, axis: str, text: str) -> str:
    """Fit for a run's name: 6:8 is 6of8."""
    label = re.sub(r"(\d+):(\d+)", r"\1of\2", text).replace("sparsity-", "")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
        raise RecipeError(f"{path}: axes.{axis}: {text!r} is no name for a run; use letters, digits, '.', '_' and '-'")
    return label


def _variant(path: Path, base: Path, name: str, labels: dict[str, str], values: Values) -> Variant:
    ranks = values.pop(RANKS, None)
    for key in ITS_OWN:
        if key in values:
            raise RecipeError(f"{path}: {key}: every recipe of a sweep has one of its own; leave it out")
    overrides = (f"name={name}", *(override_of(key, value) for key, value in values.items()))
    try:
        recipe = load_recipe(base, overrides)
        fewest = min_world_size(recipe)
        if ranks is not None and (type(ranks) is not int or ranks < 1):
            raise RecipeError(f"ranks = {ranks!r} is not a number of ranks")
        validate_world_size(recipe, fewest if ranks is None else ranks)
    except RecipeError as error:
        raise RecipeError(f"{path}: {name}: {error}") from None
    return Variant(name, labels, overrides, fewest if ranks is None else ranks, recipe)
