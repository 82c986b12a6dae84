"""A recipe's text to plain values: YAML, `extends:` (read relative to the file), `section.key=value` overrides.

Sections are merged key by key. What the keys mean is schema.py's. Recipes come from elsewhere too: whatever is in one,
reading it ends, executes nothing, and takes no more memory than a recipe deserves.
"""

import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_sbn.errors import RecipeError

MOST_BYTES, MOST_VALUES, MOST_LEVELS, MOST_PARENTS = 4 << 20, 100_000, 64, 32


def read_recipe(path: Path, overrides: Sequence[str], nearest: Callable[[str], str]) -> dict[str, Any]:
    """Values of a recipe file with its parents' and the overrides'; `nearest` suggests a key like one that is wrong.

    Raises RecipeError: a file that cannot be read or is no recipe, a cycle of `extends`, an override without a key.
    """
    values = _read_with_extends(find_recipe(path), seen=())
    for override in overrides:
        _apply_override(values, override, nearest)
    return values


def find_recipe(path: Path) -> Path:
    """The file; for recipes/... that is not below the working folder the one that came with this package, if it did."""
    if path.is_absolute() or path.parts[:1] != ("recipes",) or path.exists():
        return path
    places = (Path(__file__).parents[2], Path(sysconfig.get_path("data")) / "share" / "megatron_sbn")
    return next((place / path for place in places if (place / path).is_file()), path)


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number and 6:8 is text (YAML 1.1: text, and 368), and a key given twice is an error.

    Of its types only those that recipes are made of: no dates, sets or binary data. A document is refused that is
    nested too deeply, or in which aliases stand for too many values or for a value that holds itself.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401 - as yaml has it
        self._depth += 1
        if self._depth > MOST_LEVELS:
            raise yaml.YAMLError(f"more than {MOST_LEVELS} levels of nesting")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _count(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"it stands for more than {MOST_VALUES:,} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, "a list or mapping as key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Values that a node stands for, aliases written out; `known` has the counts of nodes (None: begun)."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = None
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count(child, known) for child in children)
    count = known[id(node)]
    if count is None:
        raise yaml.constructor.ConstructorError(None, None, "a value that holds itself", node.start_mark)
    return count


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    """010 is 10 (YAML 1.1: 8)."""
    return int(loader.construct_scalar(node))


def _refuse(loader: _Loader, node: yaml.Node) -> None:
    """What YAML says of a tag that it does not know."""
    loader.construct_undefined(node)


_TAG = "tag:yaml.org,2002:"
_NUMBERS = (f"{_TAG}int", f"{_TAG}float")
_OTHERS = [f"{_TAG}{name}" for name in ("timestamp", "binary", "set", "omap", "pairs")]
for _tag in _OTHERS:
    _Loader.add_constructor(_tag, _refuse)
_Loader.add_constructor(_NUMBERS[0], _decimal)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (*_NUMBERS, *_OTHERS)]
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
    except yaml.MarkedYAMLError as error:
        # Without the excerpt that YAML's own message has: it may cut a password in two.
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise RecipeError(f"{where}: not valid YAML{place}: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def read_text(path: Path, what: str, *, regular: bool = False) -> str:
    """The text of a recipe or sweep file, `what`. Raises RecipeError where it cannot be read, or is too long.

    With `regular`, a device or pipe, which may never end, is refused: what people name themselves may be one.
    """
    try:
        if regular and path.exists() and not (path.is_file() or path.is_dir()):
            raise RecipeError(f"{path}: is no file; name one to read a {what} from")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise RecipeError(f"{path}: more than {MOST_BYTES:,} bytes; this is no {what}")
        return content.decode("utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot read this {what}: {error.strerror or error}") from None
    except ValueError as error:  # no UTF-8, or a path that no system has
        raise RecipeError(f"{path}: cannot read this {what}: {error}") from None


def _real(path: Path) -> Path:
    """Absolute and without links; as it is where that cannot be: reading it will tell why."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path


def _read_with_extends(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = _real(path)
    if path in seen:
        raise RecipeError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in (*seen, path))}")
    if len(seen) > MOST_PARENTS:
        raise RecipeError(f"{path}: the last of more than {MOST_PARENTS} recipes that extend each other; join some")
    values = parse_yaml(read_text(path, "recipe", regular=bool(seen)), str(path))
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


def override_of(key: str, value: Any) -> str:  # noqa: ANN401 - anything that YAML can hold
    """`section.key=value` on one line, read back as that very value: a path may hold ` #` or `: `."""
    text = yaml.safe_dump(value, default_flow_style=True, width=2**20).removesuffix("...\n").strip()
    return f"{key}={text}"


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
