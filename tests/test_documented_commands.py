"""Every example of --help and every command of README runs, in one project, in this order. Long ones are made short."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from time_limit import LIMIT_SECONDS

from megatron_sbn.cli.main import _parser

ROOT = Path(__file__).parents[1]
FIRST = ("quickstart", "prepare", "keys", "train", "sweep write", "sweep", "sync")  # what others read comes first
NOT_RUN = {"--engines": "tests/engines compares environments", "hiden_size": "an error: tests/config/test_load.py"}
SHORTER = "training.steps=2 training.validation_samples=16 training.validation_interval=2 checkpoint.interval=1"
# What a command of a reader's own project is here.
HERE = (
    (r"training\.steps=300", "training.steps=80"),  # still 3x better than token frequencies, as it has to be
    (r"^(sbn train .*)$", rf"\1 {SHORTER}"),
    (r"training\.steps=20 ", ""),
    (r"(sbn sweep run) recipes/sweeps/n-of-8-tiny\.yaml", r"\1 small.yaml"),
    (r"--vocab-size 32000", "--vocab-size 300"),
    (r"@40\b(.*)@50\b", r"@1\1@2"),
    (r"http://mlflow\.example:5000", "sqlite:///{project}/runs/mlflow.db"),
    (r"^(sbn (?:sweep )?submit)(?!.*--dry-run)", r"\1 --dry-run"),
    (r"\[--dry-run\]", "--dry-run"),
)
SMALL = """
name: n-of-8-tiny
recipe: recipes/tiny/base.yaml
set: {training.steps: 2, training.validation_samples: 16, training.validation_interval: 2}
axes: {linear.sparsity: ["8:8", "6:8", "4:8", "2:8"]}
"""


def examples() -> list[str]:
    """The commands, without comments; those that make what others read first."""
    found = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("sbn ")]
    parsers = [_parser()]
    while parsers:
        parser = parsers.pop()
        found += re.findall(r"^(?:examples?:)? *(sbn .*)$", parser.epilog or "", re.MULTILINE)
        for action in parser._actions:
            parsers += getattr(action, "choices", None).values() if hasattr(action, "add_parser") else []
    lines = sorted({line.partition("  #")[0].rstrip() for line in found})
    return sorted((line for line in lines if not any(word in line for word in NOT_RUN)), key=_place)


def _place(line: str) -> int:
    return next((number for number, word in enumerate(FIRST) if line.startswith(f"sbn {word} ")), len(FIRST))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "small.yaml").write_text(SMALL)
    (folder / "corpus" / "a").mkdir(parents=True)
    text = "\n".join(f'{{"text": "line {number} of a text with {number * number} in it"}}' for number in range(3000))
    (folder / "corpus" / "a" / "b.jsonl").write_text(text)
    return folder


def test_there_are_examples() -> None:
    assert len(examples()) > 20
    assert examples()[0].startswith("sbn quickstart")


@pytest.mark.slow
@pytest.mark.parametrize("line", examples())
def test_a_documented_command_runs(line: str, project: Path) -> None:
    for pattern, replacement in HERE:
        line = re.sub(pattern, replacement.replace("{project}", str(project)), line)
    words = []
    for word in shlex.split(line)[1:]:
        is_pattern = "*" in word and not word.startswith("corpus")  # which prepare expands by itself
        words += sorted(str(path.relative_to(project)) for path in project.glob(word)) if is_pattern else [word]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sbn", *words],
        cwd=project, capture_output=True, text=True, timeout=LIMIT_SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert done.stdout.strip()
