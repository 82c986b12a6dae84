"""Choices between candidates: measured once, kept on disk, shared between processes, and never silently lost."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from sbn_kernels import tuning
from sbn_kernels.gpu.gemm import planes_gemm, ternary_dgrad, ternary_gemm, ternary_wgrad
from sbn_kernels.gpu.primitives.tiles import FAMILIES, Tile
from triton.runtime.errors import OutOfResources

CPU = torch.device("cpu")
KEY = {"tokens": 64, "out": 8, "dtype": "bf16"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and kernels that are not interpreted as far as tuning knows."""
    monkeypatch.setenv("SBN_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return tmp_path / "cache"


def forget() -> None:
    """What a new process does not know."""
    tuning._remembered.cache_clear()


def slow() -> None:
    time.sleep(0.01)


def fast() -> None:
    pass


def too_big() -> None:
    raise OutOfResources(300000, 232448, "shared memory")


def unexpected() -> None:
    raise AssertionError("a candidate ran although the choice was known")


def test_the_faster_one_is_chosen_and_remembered(folder: Path) -> None:
    calls = {"slow": slow, "fast": fast}
    assert tuning.choose("linear", KEY, calls, device=CPU) == "fast"
    known = dict.fromkeys(calls, unexpected)
    assert tuning.choose("linear", dict(reversed(KEY.items())), known, device=CPU) == "fast"
    forget()
    assert tuning.choose("linear", KEY, known, device=CPU) == "fast"
    (name, entry) = next(iter(json.loads((folder / "tuning.json").read_text()).items()))
    assert name.startswith("linear: dtype=bf16 out=8 tokens=64 | ")
    assert torch.__version__ in name
    assert entry["chosen"] == "fast"
    assert entry["milliseconds"]["slow"] >= 10 > entry["milliseconds"]["fast"]
    assert [path.name for path in folder.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize("change", ["operation", "key", "candidates"])
def test_what_is_not_the_same_is_measured_again(folder: Path, change: str) -> None:
    tuning.choose("linear", KEY, {"a": fast, "b": slow}, device=CPU)
    operation = "other" if change == "operation" else "linear"
    key = {**KEY, "tokens": 128} if change == "key" else KEY
    calls: dict[str, Callable] = {"c": slow, "d": fast} if change == "candidates" else {"a": slow, "b": fast}
    assert tuning.choose(operation, key, calls, device=CPU) == list(calls)[1]


def test_a_candidate_that_does_not_fit_is_passed_over(folder: Path) -> None:
    assert tuning.choose("linear", KEY, {"big": too_big, "slow": slow}, device=CPU) == "slow"
    with pytest.raises(OutOfResources, match="300000"):
        tuning.choose("other", KEY, {"big": too_big, "bigger": too_big}, device=CPU)
    with pytest.raises(AssertionError, match="although"):
        tuning.choose("third", KEY, {"broken": unexpected, "fast": fast}, device=CPU)
    assert len(json.loads((folder / "tuning.json").read_text())) == 1


def test_nothing_is_measured_without_a_choice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.choose("linear", KEY, {"only": unexpected}, device=CPU) == "only"
    assert not folder.exists()
    with pytest.raises(ValueError, match="no candidates"):
        tuning.choose("linear", KEY, {}, device=CPU)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"a": {"milliseconds": {}}}', "\x00"])
def test_a_damaged_table_is_an_error_with_a_way_out(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "tuning.json").write_text(text)
    with pytest.raises(ValueError, match=r"cache/tuning.json is .*: delete it"):
        tuning.choose("linear", KEY, {"a": fast, "b": slow}, device=CPU)
    assert (folder / "tuning.json").read_text() == text


def test_a_table_that_cannot_be_written_is_an_error_with_a_way_out(folder: Path) -> None:
    folder.parent.joinpath("cache").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="cannot be written .*: set SBN_KERNELS_CACHE"):
        tuning.choose("linear", KEY, {"a": fast, "b": slow}, device=CPU)


def test_entries_of_another_process_are_kept_and_used(folder: Path) -> None:
    tuning.choose("linear", KEY, {"a": fast, "b": slow}, device=CPU)
    path = folder / "tuning.json"
    table = json.loads(path.read_text())
    theirs = next(iter(table)).replace("tokens=64", "tokens=512")
    table[theirs] = {"chosen": "b", "milliseconds": {}}
    path.write_text(json.dumps(table))
    assert tuning.choose("linear", {**KEY, "tokens": 512}, {"a": unexpected, "b": unexpected}, device=CPU) == "b"
    tuning.choose("linear", {**KEY, "tokens": 1024}, {"a": fast, "b": slow}, device=CPU)
    assert {theirs, *table} < set(json.loads(path.read_text()))


def _measure_one(tokens: int) -> str:
    return tuning.choose("linear", {"tokens": tokens}, {"slow": slow, "fast": fast}, device=CPU)


def test_writers_at_the_same_time_leave_a_whole_table(folder: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        assert set(pool.map(_measure_one, range(9))) == {"fast"}
    table = json.loads((folder / "tuning.json").read_text())
    assert 1 <= len(table) <= 9
    assert {entry["chosen"] for entry in table.values()} == {"fast"}
    assert [path.name for path in folder.iterdir()] == ["tuning.json"]


def test_where_the_table_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SBN_KERNELS_CACHE", "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.table_path() == tmp_path / "elsewhere" / "tuning.json"
    monkeypatch.delenv("SBN_KERNELS_CACHE")
    assert tuning.table_path() == tmp_path / ".cache" / "sbn_kernels" / "tuning.json"


def test_token_buckets() -> None:
    assert [tuning.bucket_tokens(n) for n in (0, 1, 2, 3, 4, 5, 1023, 1024, 1025)] == [
        1,
        1,
        2,
        4,
        4,
        8,
        1024,
        1024,
        2048,
    ]


def test_tiles_are_picked_by_time_and_can_be_forced(folder: Path) -> None:
    tiles = (Tile(128, 256, 128), Tile(16, 16, 32, warps=4, stages=2, group=1, tma=True, slices=2))
    assert [tile.name for tile in tiles] == ["128x256x128-w8-s3-g8", "16x16x32-w4-s2-g1-tma-x2"]
    runs = {tiles[0]: slow, tiles[1]: fast}
    assert tuning.pick_tile("linear", KEY, tiles, lambda tile: runs[tile](), device=CPU) is tiles[1]
    forced = Tile(64, 64, 64)
    assert tuning.pick_tile("linear", KEY, tiles, lambda _: unexpected(), device=CPU, config=forced) is forced


def test_names_of_candidates_are_unique() -> None:
    tables = (
        ternary_gemm.INT8_TILES,
        planes_gemm.PLANES_TILES,
        ternary_dgrad.DGRAD_TILES,
        ternary_wgrad.GRADIENT_TILES,
    )
    for table in tables:
        assert set(table) == set(FAMILIES)
        for tiles in table.values():
            assert len({tile.name for tile in tiles}) == len(tiles)


def test_the_table_can_be_checked_before_work_begins(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.check_table()
    assert json.loads((folder / "tuning.json").read_text()) == {}
    (folder / "tuning.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged .* delete it"):
        tuning.check_table()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SBN_KERNELS_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="cannot be written .*: set SBN_KERNELS_CACHE"):
        tuning.check_table()


def test_a_home_that_cannot_be_written_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A container, a compute node. What was chosen is remembered by this process."""
    monkeypatch.delenv("SBN_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    tuning._warn_once.cache_clear()
    tuning.check_table()
    for _ in range(2):
        assert tuning.choose("nowhere", KEY, {"a": fast, "b": slow}, device=CPU) == "a"
        assert tuning.choose("nowhere", KEY, {"a": unexpected, "b": unexpected}, device=CPU) == "a"
    assert [record.message for record in caplog.records] == [
        "/dev/null/.cache/sbn_kernels/tuning.json cannot be written (Not a directory): kernels are measured again at "
        "every start; SBN_KERNELS_CACHE names a folder to remember them in"
    ]
