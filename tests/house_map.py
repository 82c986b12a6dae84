"""The rooms of megatron_sbn, and which imports which: `python tests/house_map.py` prints figures and the floors.

A room is a folder or a module at the top of megatron_sbn. An arrow goes from a room to one that it imports, at once,
inside a function or for type checkers. The floor of a room is one above the highest room that it imports.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_sbn"

Arrows = dict[str, set[str]]


def room(module: str) -> str:
    """The room of a module of the package: megatron_sbn.plan.memory -> plan."""
    return module.split(".")[1] if module.count(".") else "__init__"


def imported(tree: ast.Module, package: str) -> Iterator[tuple[str, int]]:
    """(module, line) of every import of `package`; `from package import name` imports package.name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == package)
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == package:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def arrows(root: Path = ROOT / PACKAGE) -> Arrows:
    """Every room and the other rooms that it imports."""
    found: Arrows = defaultdict(set)
    for path in sorted(root.rglob("*.py")):
        own = path.relative_to(root).parts[0].removesuffix(".py")
        found[own] |= {room(module) for module, _ in imported(ast.parse(path.read_text()), root.name)} - {own}
    known = set(found)
    return {own: others & known - {"__init__"} for own, others in found.items() if own != "__init__"}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of rooms that reach each other."""
    reached = {own: reachable(graph, own) for own in graph}
    groups = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph if a in reached[a]}
    return [list(group) for group in sorted(groups)]


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Rooms that are imported, directly or not."""
    seen: set[str] = set()
    left = list(graph[start])
    while left:
        here = left.pop()
        if here not in seen:
            seen.add(here)
            left += graph[here]
    return seen


def floors(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Rooms by floor, the lowest first; without circles."""
    height: dict[str, int] = {}

    def rise(own: str) -> int:
        if own not in height:
            height[own] = 1 + max((rise(other) for other in graph[own]), default=-1)
        return height[own]

    rows: dict[int, list[str]] = defaultdict(list)
    for own in sorted(graph):
        rows[rise(own)].append(own)
    return [rows[floor] for floor in sorted(rows)]


def main() -> int:
    """Prints figures; 0 where no rooms import each other."""
    graph = arrows()
    files = list((ROOT / PACKAGE).rglob("*.py"))
    tops = [path for path in files if path.parent == ROOT / PACKAGE and path.stem != "__init__"]
    folders = {path.parent for path in files if path.parent != ROOT / PACKAGE}
    fullest = max(folders, key=lambda folder: len(list(folder.glob("*.py"))))
    kernels = list((ROOT / "kernels" / "sbn_kernels").glob("*.py"))
    around = circles(graph)
    print(f"rooms {len(graph)}, arrows {sum(map(len, graph.values()))}, circles {len(around)} {around or ''}")
    print(f"modules at the top {len(tops)}; most files in a folder {len(list(fullest.glob('*.py')))} ({fullest.name})")
    print(f"files in sbn_kernels itself {len(kernels)}")
    for place in (PACKAGE, "kernels/sbn_kernels", "kernels/bench", "tests"):
        lines = sum(len(path.read_text().splitlines()) for path in (ROOT / place).rglob("*.py"))
        print(f"lines in {place}: {lines:,}")
    if not around:
        print(f"floors {len(floors(graph))}, the lowest first:")
        for row in floors(graph):
            print("  " + ", ".join(row))
    return int(bool(around))


if __name__ == "__main__":
    sys.exit(main())
