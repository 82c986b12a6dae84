"""A recipe file to a checked `Recipe`, in three steps: YAML (with `extends:`) -> overrides -> schema, then validation.

A key that does not exist, a value of the wrong type or a combination that cannot be trained (`validation.py`) is a
`RecipeError` of one line that names the field, the value and the way out, before anything is allocated.
"""

import difflib
import re
from pathlib import Path

from pydantic import BaseModel, ValidationError

from megatron_sbn.config import validation
from megatron_sbn.config.schema import Recipe
from megatron_sbn.config.yaml_file import read_recipe
from megatron_sbn.errors import RecipeError
from megatron_sbn.redaction import excerpt, mask_secrets


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe file, applies `section.key=value` overrides, validates. Raises RecipeError."""
    values = read_recipe(Path(path), overrides, _nearest)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(" ".join(_problem(error).split())) from None
    validation.validate_recipe(recipe)
    return recipe


def check_no_password(recipe: Recipe, place: str) -> None:
    """Raises RecipeError where a file of this recipe, kept in `place`, would hold a password."""
    uri = recipe.tracking.uri
    if uri is not None and mask_secrets(uri) != uri:
        raise RecipeError(
            f"tracking.uri = {mask_secrets(uri)} holds a password, which would be kept in {place}; "
            "give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment instead"
        )


def _fields(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a section."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _fields(field.annotation, f"{prefix}{name}.")
    return keys


def _nearest(key: str) -> str:
    match = difflib.get_close_matches(key, _fields(Recipe), n=1, cutoff=0.75)
    return f"; did you mean {match[0]}?" if match else f"; the sections are {', '.join(Recipe.model_fields)}"


def _problem(error: ValidationError) -> str:
    """The first problem of a validation, as `field = value: what is wrong and what would be right`."""
    problem = error.errors()[0]
    internal = re.compile(r"(tuple|literal|constrained|function|none)")  # pydantic's own steps through a union
    location = [str(part) for part in problem["loc"] if not internal.match(str(part))]
    field = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"{field} is not a recipe key{_nearest(field)}"
    if problem["type"] == "missing":
        return f"{field} is missing: the recipe must set it"
    return f"{field} = {excerpt(problem['input'])}: {problem['msg'].removeprefix('Value error, ')}"
