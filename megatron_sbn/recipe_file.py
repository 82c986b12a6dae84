"""A recipe's text to plain values: YAML, `extends:` (read relative to the file), `section.key=value` overrides.

Sections are merged key by key. What the keys mean is config.py's.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_sbn.errors import RecipeError


def read_recipe(path: Path, overrides: Sequence[str], nearest: Callable[[str], str]) -> dict[str, Any]:
    """Values of a recipe file with its parents' and the overrides'; `nearest` suggests a key like one that is wrong.

    Raises RecipeError: a file that cannot be read or is no recipe, a cycle of `extends`, an override without a key.
    """
    values = _read_with_extends(path, seen=())
    for override in overrides:
        _apply_override(values, override, nearest)
    return values


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number and 6:8 is text (YAML 1.1: text, and 368), and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    """010 is 10 (YAML 1.1: 8)."""
    return int(loader.construct_scalar(node))


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.add_constructor(_NUMBERS[0], _decimal)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_NUMBERS[0], re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _NUMBERS[1],
    re.compile(r"^[-+]?((\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|\.inf|\.nan)$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:  # noqa: ANN401 - anything that YAML can hold
    """What YAML text says, numbers as people write them. Raises RecipeError naming `where`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = " ".join(str(error).split())[:300]
        raise RecipeError(f"{where}: not valid YAML: {problem}") from None


def _read_with_extends(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise RecipeError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in (*seen, path))}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RecipeError(f"{path}: cannot read this recipe: {error}") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{path}: a recipe is a mapping of sections (model:, training:, ...)")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: extends: {parent!r} is not the path of a recipe")
    return _merge(_read_with_extends(path.parent / parent, (*seen, path)), values)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; everything else, lists included, is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = merged[key] | value if both else value
    return merged


def _apply_override(values: dict[str, Any], override: str, nearest: Callable[[str], str]) -> None:
    """`a.b=c`, c read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override!r}: an override is section.key=value, such as training.steps=20")
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{override!r}: {section} is not a section{nearest(key)}")
        values = inner
    values[last] = parse_yaml(text, repr(override))
