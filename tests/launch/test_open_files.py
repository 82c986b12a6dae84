"""A blend of more shards than the usual limit of open files, and of more than any limit."""

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sbn.data.shards import ShardWriter
from megatron_sbn.errors import InputError
from megatron_sbn.launch import open_files

MANY = """
import resource, sys
from megatron_sbn.data.dataset import SequentialDataset, build_dataset
from megatron_sbn.data.shards import Shard
from megatron_sbn.errors import InputError
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
try:
    blend = build_dataset([(f"s{number}", 1.0) for number in range(300)], 4, 0)
    held_out = SequentialDataset([f"s{number}" for number in range(300)], 4)
    print(sum(int(blend[number][0]) for number in range(300)), len(held_out))
except InputError as error:
    print(error)
"""


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    writer = ShardWriter(tmp_path / "a.bin", tmp_path / "a.idx", 340)
    writer.add(np.full(9, 7))
    writer.finish()
    for number in range(300):
        for suffix in ("bin", "idx"):
            (tmp_path / f"s{number}.{suffix}").symlink_to(f"a.{suffix}")
    return tmp_path


def test_more_shards_than_open_files(shards: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    words = [sys.executable, "-c", MANY, "256", str(hard)]
    done = subprocess.run(words, cwd=shards, capture_output=True, text=True, check=True)
    assert done.stdout == f"{300 * 7} 600\n"


def test_more_shards_than_any_limit_allows(shards: Path) -> None:
    words = [sys.executable, "-c", MANY, "256", "300"]
    done = subprocess.run(words, cwd=shards, capture_output=True, text=True, check=True)
    assert "data: 300 shards take 8" in done.stdout
    assert "open files, and a process may have 300 (ulimit -Hn); raise that limit" in done.stdout


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((4096, 4096), None),
        ((100, 5000), (622, 5000)),
        ((100, -1), (622, -1)),
        ((-1, -1), None),
        ((100, 400), (400, 400)),
    ],
)
def test_limits(monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], expected: tuple[int, int] | None) -> None:
    made = []
    monkeypatch.setattr(open_files, "_open_now", lambda: 10)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: made.append(pair))
    open_files.allow_open_files(100)
    assert made == ([] if expected is None else [expected])


def test_the_reserve_may_be_smaller_but_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_open_now", lambda: 10)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 300))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with pytest.raises(InputError, match="100 shards take 622 open files, and a process may have 300"):
        open_files.allow_open_files(100)
