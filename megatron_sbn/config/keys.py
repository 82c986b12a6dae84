"""Every recipe key: what it may be, its default, what it means. Read off the schema, so it cannot be out of date."""

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_sbn.config.schema import Recipe, Shard
from megatron_sbn.config.values import Sparsity
from megatron_sbn.text_table import aligned

HEADER = ("key", "values", "default", "meaning")
_TITLE = """# Recipe keys

Every key of a recipe, as `sbn keys` prints it. A recipe is YAML; `extends: OTHER.yaml` takes another one as a base, and
`section.key=value` on the command line changes a key.
"""


@dataclass(frozen=True)
class Key:
    """One dotted key and what is known of it, as text."""

    name: str
    values: str
    default: str
    meaning: str


def keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[Key]:
    """All keys of a section in their order; those of lists of sections as NAME.*.KEY."""
    for name, field in section.model_fields.items():
        inner, repeated = _section(field.annotation)
        if inner is None or repeated or field.annotation is not inner:
            yield Key(f"{prefix}{name}", _values(field), _default(field), field.description or "")
        if inner is not None:
            yield from keys(inner, f"{prefix}{name}.{'*.' if repeated else ''}")


def matching(words: Sequence[str]) -> list[Key]:
    """The keys in which all of the words occur, in their names, values or meanings."""
    return [k for k in keys() if all(w.lower() in f"{k.name} {k.values} {k.meaning}".lower() for w in words)]


def table(found: Sequence[Key]) -> str:
    """For a terminal."""
    return "\n".join(aligned(HEADER, [(k.name, k.values, k.default, k.meaning) for k in found]))


def markdown() -> str:
    """docs/recipe.md."""
    lines = [_TITLE, "| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for key in keys():
        cells = (f"`{key.name}`", key.values, key.default, key.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _section(annotation: Any) -> tuple[type[BaseModel] | None, bool]:  # noqa: ANN401 - any type
    """The section that a field holds, and whether it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    inner = [_section(part) for part in get_args(annotation) if part is not Ellipsis]
    found, repeated = next((pair for pair in inner if pair[0] is not None), (None, False))
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return found, repeated if is_union else found is not None


def _values(field: FieldInfo) -> str:
    return _described(field.annotation, field.metadata)


def _described(annotation: Any, metadata: Sequence[object]) -> str:  # noqa: ANN401 - any type
    """What a value may be, in the words of a recipe."""
    origin = get_origin(annotation)
    if annotation in (get_args(Sparsity)[0], Sparsity):
        return "N:M"
    if origin in (Union, types.UnionType):
        return " | ".join(_described(part, metadata) for part in get_args(annotation))
    if origin is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        inner, *more = get_args(annotation)
        return _described(inner, [m for part in more for m in getattr(part, "metadata", [part])])
    if origin is tuple:
        return "path | list" if Shard in get_args(annotation) else "list"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {int: "whole number", float: "number", str: "text", bool: "true | false"}
    limits = [f" >= {m.ge}" for m in metadata if isinstance(m, Ge)]
    limits += [f" > {m.gt}" for m in metadata if isinstance(m, Gt)] + [
        f" < {m.lt}" for m in metadata if isinstance(m, Lt)
    ]
    return names[annotation] + (",".join(limits) if annotation in (int, float) else "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    value = field.default
    if isinstance(value, tuple):
        return "{}:{}".format(*value) if len(value) == 2 else str(list(value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
