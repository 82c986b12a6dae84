"""The rules of this project that a program can check, over every Python file; each check is shown what breaks it.

A check takes a `Source` and gives its complaints, `path:line: what`, as text.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 60, 150
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc"}
_LIGHT = (
    "training/preflight training/schedule analysis cli cluster config engines errors launch plan runs tracking train."
)
NO_TORCH = tuple(f"megatron_sbn/{room}" for room in _LIGHT.split())
HEAVY = ("torch", "deepspeed", "megatron", "mlflow", "sbn_kernels")
ONLY_IMPORTER = {"deepspeed": "megatron_sbn/parallel/zero/", "mlflow": "megatron_sbn/tracking/mlflow_"}


@dataclass(frozen=True)
class Source:
    """One Python file; `path` is relative to the project, with forward slashes."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def packaged(self) -> bool:
        """Whether users import it, so that its public names are documented."""
        return self.path.startswith(("megatron_sbn/", "kernels/sbn_kernels/"))


Check = Callable[[Source], Iterator[str]]


def python_files() -> list[Source]:
    """What git tracks; without git (a source archive), every file outside hidden and environment folders."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not listed:
        listed = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if not skipped(p.relative_to(ROOT))]
    return [Source(p, (ROOT / p).read_text(encoding="utf-8")) for p in sorted(listed) if (ROOT / p).is_file()]


def skipped(path: Path) -> bool:
    return any(part.startswith(".") or part in ("runs", "build", "dist") for part in path.parts)


# --- checks ----------------------------------------------------------------------------------------------------------


def check_file_length(source: Source) -> Iterator[str]:
    lines = len(source.text.splitlines())
    if lines > FILE_LINES:
        yield f"{source.path}:{lines}: a file has at most {FILE_LINES} lines"


def check_function_length(source: Source) -> Iterator[str]:
    for function in functions(source.tree):
        most = KERNEL_LINES if is_kernel(function) else FUNCTION_LINES
        # Decorators (lists of test cases) are not counted: the function begins at `def`.
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if lines > most:
            yield f"{source.path}:{function.lineno}: {function.name} has {lines} lines, at most {most}"


def check_docstrings(source: Source) -> Iterator[str]:
    tree = source.tree
    if not ast.get_docstring(tree):
        yield f"{source.path}:1: the module has no docstring"
    if not source.packaged:
        return
    for node in public_definitions(tree.body):
        if not ast.get_docstring(node):
            yield f"{source.path}:{node.lineno}: {node.name} has no docstring"


def check_ascii(source: Source) -> Iterator[str]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if not line.isascii():
            yield f"{source.path}:{number}: not ASCII"


def check_annotations(source: Source) -> Iterator[str]:
    if not source.packaged:
        return
    for function in functions(source.tree):
        if is_kernel(function):
            continue
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        arguments += [a for a in (function.args.vararg, function.args.kwarg) if a is not None]
        missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if missing:
            yield f"{source.path}:{function.lineno}: {function.name} does not annotate {', '.join(missing)}"
        if function.returns is None:
            yield f"{source.path}:{function.lineno}: {function.name} does not annotate what it returns"


def check_name(source: Source) -> Iterator[str]:
    parts = set(Path(source.path).with_suffix("").parts)
    for name in sorted(parts & FORBIDDEN_NAMES):
        yield f"{source.path}:1: {name} says nothing; name it for what it holds"
    if source.path == "kernels/__init__.py":
        yield f"{source.path}:1: kernels/ must not be a package: Hugging Face's `kernels` is one"


def check_exceptions(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        for kind in caught:
            if kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException")):
                yield f"{source.path}:{node.lineno}: catches everything; name what can happen"


def check_leftovers(source: Source) -> Iterator[str]:
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
    for number, line in enumerate(source.text.splitlines(), 1):
        if any(word in line for word in words):
            yield f"{source.path}:{number}: left to do"


def check_module_state(source: Source) -> Iterator[str]:
    """Module-level containers are constants: upper case (or dunder), and nothing rebinds a global."""
    for node in source.tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not is_mutable(node.value):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name) and not is_constant_name(target.id):
                yield f"{source.path}:{node.lineno}: {target.id} is module-level mutable state"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"{source.path}:{node.lineno}: rebinds the global {', '.join(node.names)}"


def check_imports(source: Source) -> Iterator[str]:
    """One importer for each optional engine; no torch before the recipe is checked. Rooms: test_architecture.py."""
    for module, line, lazy in imports(source):
        root = module.partition(".")[0]
        if source.packaged and root in ONLY_IMPORTER and not source.path.startswith(ONLY_IMPORTER[root]):
            yield f"{source.path}:{line}: only {ONLY_IMPORTER[root]} imports {root}"
        if source.path.startswith(NO_TORCH) and root in HEAVY and not lazy:
            yield f"{source.path}:{line}: imports {root} before the recipe is checked"
        if source.path.startswith("kernels/sbn_kernels/") and not kernel_import(module):
            yield f"{source.path}:{line}: sbn_kernels imports torch, triton and the standard library only, not {module}"


def check_kernel_library(source: Source) -> Iterator[str]:
    """No autograd, no distributed in sbn_kernels, by whatever name."""
    if not source.path.startswith("kernels/sbn_kernels/"):
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "torch.autograd",
            "torch.distributed",
            "torch.dist",
        ):
            yield f"{source.path}:{node.lineno}: {ast.unparse(node)} belongs to megatron_sbn"


CHECKS: tuple[Check, ...] = (
    check_file_length,
    check_function_length,
    check_docstrings,
    check_ascii,
    check_annotations,
    check_name,
    check_exceptions,
    check_leftovers,
    check_module_state,
    check_imports,
    check_kernel_library,
)


# --- what checks are made of -----------------------------------------------------------------------------------------

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def is_kernel(function: Function) -> bool:
    """Under @triton.jit or @gluon.jit, with or without arguments."""
    names = [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in function.decorator_list]
    return any(name in ("triton.jit", "gluon.jit") for name in names)


def public_definitions(body: Iterable[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
    """Public functions, classes and their public methods."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body)


def is_mutable(value: ast.expr | None) -> bool:
    """A list, dict or set by its display, comprehension or constructor."""
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rpartition(".")[2] in ("list", "dict", "set", "defaultdict", "deque", "Counter")
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def is_constant_name(name: str) -> bool:
    return name == name.upper() or (name.startswith("__") and name.endswith("__"))


def imports(source: Source) -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether it is not imported at once: inside a function or for type checkers only)."""
    tree = source.tree
    late = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, Function) or (isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test))
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, id(node) in late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolved(node, source.path)
            # `from package import module` imports the module.
            yield from ((f"{module}.{alias.name}", node.lineno, id(node) in late) for alias in node.names)


def resolved(node: ast.ImportFrom, path: str) -> str:
    """The absolute module of `from ... import`."""
    if not node.level:
        return node.module or ""
    package = Path(path).parts[: -node.level]
    return ".".join([*package, *filter(None, [node.module])])


def kernel_import(module: str) -> bool:
    root = module.partition(".")[0]
    if module.startswith(("torch.autograd", "torch.distributed")):
        return False
    return root in ("torch", "triton", "sbn_kernels") or root in sys.stdlib_module_names


# --- the project -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_project_keeps_its_rules(check: Check) -> None:
    sources = python_files()
    assert len(sources) > 30
    complaints = [complaint for source in sources for complaint in check(source)]
    assert not complaints, "\n".join(complaints)


# --- the checks ------------------------------------------------------------------------------------------------------

DOC = '"""A module."""\n'
LONG_BODY = "\n".join("    x = 1" for _ in range(70))
VIOLATIONS: tuple[tuple[Check, str, str], ...] = (
    (check_file_length, "megatron_sbn/a.py", DOC + "\n" * 400),
    (check_function_length, "tests/test_a.py", f"{DOC}def f():\n{LONG_BODY}\n"),
    (
        check_function_length,
        "kernels/sbn_kernels/a.py",
        f"{DOC}@triton.jit\ndef f():\n{LONG_BODY}\n{LONG_BODY}\n{LONG_BODY}",
    ),
    (check_function_length, "megatron_sbn/a.py", f"{DOC}class A:\n  async def f():\n{LONG_BODY}\n"),
    (check_docstrings, "tests/test_a.py", "x = 1\n"),
    (check_docstrings, "megatron_sbn/a.py", f"{DOC}def f() -> None:\n    pass\n"),
    (check_docstrings, "megatron_sbn/a.py", f'{DOC}class A:\n    """A."""\n\n    def f(self) -> None:\n        pass\n'),
    (check_docstrings, "kernels/sbn_kernels/a.py", f"{DOC}class A:\n    pass\n"),
    (check_ascii, "setup.py", f"{DOC}x = '\u2014'\n"),
    (check_annotations, "megatron_sbn/a.py", f"{DOC}def f(x) -> None:\n    pass\n"),
    (check_annotations, "megatron_sbn/a.py", f"{DOC}def f(*, x) -> None:\n    pass\n"),
    (check_annotations, "megatron_sbn/a.py", f"{DOC}def f(*xs, **kw: int) -> None:\n    pass\n"),
    (check_annotations, "kernels/sbn_kernels/a.py", f"{DOC}def _f(x: int):\n    pass\n"),
    (check_name, "megatron_sbn/utils.py", DOC),
    (check_name, "tests/helpers/test_a.py", DOC),
    (check_name, "kernels/__init__.py", DOC),
    (check_exceptions, "megatron_sbn/a.py", f"{DOC}try:\n    pass\nexcept:\n    pass\n"),
    (check_exceptions, "tests/a.py", f"{DOC}try:\n    pass\nexcept Exception as error:\n    pass\n"),
    (check_exceptions, "tests/a.py", f"{DOC}try:\n    pass\nexcept (OSError, BaseException):\n    pass\n"),
    (check_leftovers, "megatron_sbn/a.py", f"{DOC}x = 1  # {'TO' + 'DO'}: later\n"),
    (check_module_state, "megatron_sbn/a.py", f"{DOC}cache = {{}}\n"),
    (check_module_state, "megatron_sbn/a.py", f"{DOC}_seen: list[int] = []\n"),
    (check_module_state, "megatron_sbn/a.py", f"{DOC}table = collections.defaultdict(list)\n"),
    (check_module_state, "megatron_sbn/a.py", f"{DOC}def f() -> None:\n    global x\n    x = 1\n"),
    (check_imports, "megatron_sbn/training/step.py", f"{DOC}import deepspeed\n"),
    (check_imports, "megatron_sbn/training/step.py", f"{DOC}def f() -> None:\n    from deepspeed.ops import adam\n"),
    (check_imports, "megatron_sbn/training/loop.py", f"{DOC}import mlflow.tracking\n"),
    (check_imports, "megatron_sbn/config/load.py", f"{DOC}import torch\n"),
    (check_imports, "megatron_sbn/plan/memory.py", f"{DOC}from torch import Tensor\n"),
    (check_imports, "megatron_sbn/launch/local.py", f"{DOC}from megatron.core import parallel_state\n"),
    (check_imports, "kernels/sbn_kernels/a.py", f"{DOC}import numpy\n"),
    (check_imports, "kernels/sbn_kernels/a.py", f"{DOC}import megatron_sbn.errors\n"),
    (check_imports, "kernels/sbn_kernels/a.py", f"{DOC}import torch.distributed as dist\n"),
    (check_imports, "kernels/sbn_kernels/a.py", f"{DOC}from torch.autograd import Function\n"),
    (check_imports, "kernels/sbn_kernels/a.py", f"{DOC}from torch import distributed\n"),
    (check_kernel_library, "kernels/sbn_kernels/a.py", f"{DOC}class A(torch.autograd.Function):\n    pass\n"),
    (check_kernel_library, "kernels/sbn_kernels/a.py", f"{DOC}torch.distributed.all_reduce(x)\n"),
)


@pytest.mark.parametrize(("check", "path", "text"), VIOLATIONS, ids=lambda value: getattr(value, "__name__", None))
def test_a_check_complains(check: Check, path: str, text: str) -> None:
    (complaint,) = check(Source(path, text))
    assert complaint.startswith(f"{path}:")


GOOD = '''"""Says what it does."""

import json

import torch
from sbn_kernels import pack

LIMITS = {"rows": 3}
__all__ = ["f"]


def f(x: torch.Tensor, *rest: int, **named: int) -> int:
    """Returns a number."""
    try:
        return len(json.loads("[]"))
    except (ValueError, OSError):
        return pack(x)


class _Private:
    def method(self) -> None:
        pass
'''


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_is_content_with_what_is_good(check: Check) -> None:
    kernel = f"{DOC}@triton.jit(do_not_specialize=['n'])\ndef f(x, n):\n    '''Doc.'''\n{LONG_BODY}\n"
    lazy = f"{DOC}def _f() -> None:\n    import torch\n    from megatron_sbn.config import Recipe\n"
    for source in (
        Source("megatron_sbn/functional/settings.py", GOOD),
        Source("kernels/sbn_kernels/a.py", GOOD),
        Source("kernels/sbn_kernels/a.py", kernel),
        Source("megatron_sbn/config/validation.py", lazy),
        Source("tests/test_a.py", f"{DOC}def test_a(x):\n    assert x\n"),
    ):
        assert list(check(source)) == []


def test_every_check_is_shown_what_it_must_refuse() -> None:
    assert {check for check, _, _ in VIOLATIONS} == set(CHECKS)
