"""The rooms of megatron_sbn stand on each other in the order of LAYERS: an import goes down, never up or sideways."""

import ast
from collections.abc import Sequence
from pathlib import Path

import pytest
from house_map import PACKAGE, ROOT, arrows, circles, floors, imported

# The lowest first. docs/architecture.md says what each room is for.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("functional", "redaction", "text_table"),
    ("errors",),
    ("atomic_files", "config", "engines", "launch"),
    ("data", "parallel", "plan"),
    ("layers", "runs"),
    ("model", "telemetry", "tracking"),
    ("analysis", "checkpoint"),
    ("training",),
    ("cluster", "doctor", "train"),
    ("cli",),
    ("__main__",),
)
# Walls within a room that is imported: no engine is known to the layers, and the model knows ranks but not ZeRO.
WITHIN = {("layers", "parallel"): {"shard"}, ("model", "parallel"): {"shard", "state"}}


def complaints(root: Path, layers: Sequence[Sequence[str]]) -> list[str]:
    """What breaks the order, `room -> room` or a room that is in no row or in two."""
    graph = arrows(root)
    rows = {name: row for row, names in enumerate(layers) for name in names}
    placed = [name for names in layers for name in names]
    found = [f"{name} is in no row" for name in sorted(graph) if name not in rows]
    found += [f"{name} is in two rows" for name in sorted(set(placed)) if placed.count(name) > 1]
    found += [f"{name} is not there" for name in sorted(set(placed) - set(graph))]
    for own, others in sorted(graph.items()):
        found += [f"{own} -> {o}" for o in sorted(others) if own in rows and o in rows and rows[o] >= rows[own]]
    return found


def test_imports_go_down() -> None:
    assert complaints(ROOT / PACKAGE, LAYERS) == []


def test_no_rooms_import_each_other() -> None:
    assert circles(arrows()) == []


@pytest.mark.parametrize(("own", "other"), WITHIN)
def test_a_room_sees_the_allowed_modules_of_another_only(own: str, other: str) -> None:
    place = ROOT / PACKAGE / own
    for path in place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
        for module, line in imported(ast.parse(path.read_text()), PACKAGE):
            if module.startswith(f"{PACKAGE}.{other}."):
                assert module.split(".")[2] in WITHIN[own, other], f"{path}:{line}: imports {module}"


def package(folder: Path, **modules: str) -> Path:
    """A package of modules, each with its text; `a__b` is module b of folder a."""
    root = folder / "rooms"
    for name, text in modules.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ({"low": "", "high": "from rooms.low import x\n"}, []),
        ({"low": "def f():\n    import rooms.high\n", "high": ""}, ["low -> high"]),
        ({"low__a": "from rooms import high\n", "high": ""}, ["low -> high"]),
        ({"low__a": "from rooms.low.b import x\n", "low__b": "", "high": ""}, []),
        ({"low": "", "high": "", "new": ""}, ["new is in no row"]),
        ({"low": ""}, ["high is not there"]),
        ({"low": "", "high": "", "side": "import rooms.high\n"}, ["side is in no row"]),
    ],
)
def test_what_breaks_the_order_is_named(modules: dict[str, str], expected: list[str], tmp_path: Path) -> None:
    assert complaints(package(tmp_path, **modules), (("low",), ("high",))) == expected


def test_rooms_that_import_each_other_are_a_circle(tmp_path: Path) -> None:
    graph = arrows(package(tmp_path, a="import rooms.b\n", b="import rooms.c\n", c="import rooms.a\n", d=""))
    assert circles(graph) == [["a", "b", "c"]]
    assert floors(arrows(package(tmp_path / "x", a="import rooms.b\n", b="", c="import rooms.a\n"))) == [
        ["b"], ["a"], ["c"],
    ]  # fmt: skip
