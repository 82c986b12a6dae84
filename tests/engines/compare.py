"""The same bits on every release of the engines: environments are made, their tests run, their bits compared.

    python tests/engines/compare.py [NAME ...]            # also `make engines`; names: releases.py

Each environment is made once, in .venv-engines/NAME, with the first Python on PATH that is new enough (PYTHONS are
tried in their order). The quick tests of layouts, experts, steps and checkpoints run in it; then `sbn doctor --engines`
sets its bits beside those of the environment that runs this, for a ternary model and for a mixture of experts.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from releases import OTHERS, ROOT, Releases

FOLDER = ROOT / ".venv-engines"
RECIPES = ("recipes/quickstart.yaml", "recipes/quickstart-moe.yaml")
PYTHONS = ("python3", "python3.12", "python3.13", "python3.14", "python3.11")
# Layouts, sequence parallelism, experts and ZeRO; checkpoints at the same and at other layouts; the whole run.
TESTS = (
    *("tests/distributed/test_layouts.py", "tests/distributed/test_experts.py", "tests/distributed/test_grid.py"),
    *("tests/distributed/test_optimizer_step.py", "tests/distributed/test_parallel_layers.py"),
    *(
        "tests/distributed/test_resume.py",
        "tests/distributed/test_resharding.py",
        "tests/distributed/test_comm_counter.py",
    ),
    *("tests/distributed/test_variants.py", "tests/data/test_shards.py", "tests/training/test_run.py"),
)


def main(arguments: list[str]) -> int:
    """Makes, tests and compares; 0 if all tests pass and all bits are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {releases.name: releases for releases in OTHERS}
    parser.add_argument("names", nargs="*", choices=[[], *known], metavar="NAME", help=f"default: {', '.join(known)}")
    parser.add_argument("--no-tests", action="store_true", help="compare bits alone")
    options = parser.parse_args(arguments)
    chosen = [known[name] for name in options.names] or list(OTHERS)
    pythons = [environment(releases) for releases in chosen]
    failed = []
    for releases, python in zip(chosen, pythons, strict=True):
        if not options.no_tests and run([str(python), "-m", "pytest", "-q", "-m", "not slow", *TESTS], releases.name):
            failed.append(f"tests on {releases.name}")
    for recipe in RECIPES:
        command = [sys.executable, "-m", "megatron_sbn.cli", "doctor", recipe, "--engines", *map(str, pythons)]
        if run(command, recipe):
            failed.append(f"the bits of {recipe}")
    print(f"FAILED: {'; '.join(failed)}" if failed else "the same bits on every release")
    return int(bool(failed))


def environment(releases: Releases) -> Path:
    """The interpreter of an environment with these releases, which is made if it is not there or its pins changed."""
    folder = FOLDER / releases.name
    python, pins = folder / "bin" / "python", folder / "constraints.txt"
    if python.exists() and pins.exists() and pins.read_text() == releases.constraints():
        return python
    base = interpreter(releases.python)
    print(f"--- making {folder} with {base}; PyPI's torch for Linux brings CUDA, gigabytes", flush=True)
    subprocess.run([base, "-m", "venv", "--clear", str(folder)], check=True)
    unfinished = folder / "constraints-unfinished.txt"
    unfinished.write_text(releases.constraints())
    for wanted in (["torch"], ["--editable", f"{ROOT}[dev]"]):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-c", str(unfinished), *wanted], check=True)
    unfinished.rename(pins)
    return python


def interpreter(oldest: tuple[int, int]) -> str:
    """The first of PYTHONS that runs and is new enough; ends the program with one line where none is."""
    for name in (os.environ.get("PYTHON", "python3"), *PYTHONS):
        try:
            question = [name, "-c", f"import sys; sys.exit(sys.version_info < {oldest!r})"]
            if subprocess.run(question, capture_output=True, check=False).returncode == 0:
                return name
        except OSError:
            continue
    wanted = ".".join(map(str, oldest))
    sys.exit(f"no Python >= {wanted} among {', '.join(PYTHONS)}; put one on PATH, or name it with PYTHON=")


def run(command: list[str], title: str) -> int:
    """Runs a command in the project's folder and shows what it prints; returns its status."""
    print(f"--- {title}: {' '.join(command[1:6])} ...", flush=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
