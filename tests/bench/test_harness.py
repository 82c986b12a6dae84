"""Statistics, turns, checks and records of benchmarks, on contenders whose behaviour is known."""

import csv
import time
from collections import Counter
from pathlib import Path

import goals
import harness
import pytest
import records
import torch
from harness import Benchmark, Case, Contender, Measurement, Result, UnavailableError

CPU = torch.device("cpu")
CASE = Case("kernel", "3b.down", 4, 3, 2, "6:8", "float32", 1000, 2000, "copy")
WHERE = records.Environment("a CPU", "2.13", "3.9", "abc+")


def inputs() -> harness.Inputs:
    return {"x": torch.arange(6.0).reshape(2, 3)}


def doubles(scale: float = 2.0, delay: float = 0.0, **options: object) -> Contender:
    """A contender that gives `scale` times x, which should be twice x."""

    def prepare(given: harness.Inputs) -> harness.Call:
        def call() -> torch.Tensor:
            time.sleep(delay)
            return given["x"] * scale

        return call

    name = str(options.pop("name", f"x{scale}"))
    return Contender(name, prepare, lambda given: (given["x"] * 2,), **options)  # type: ignore[arg-type]


def missing(given: harness.Inputs) -> harness.Call:
    raise UnavailableError("no such library")


def refusing(given: harness.Inputs) -> harness.Call:
    raise RuntimeError("this shape is refused\nwith a second line")


def measured(*contenders: Contender, seconds: float = 0.05) -> Result:
    return harness.measure(Benchmark(CASE, inputs, contenders, seconds), CPU)


def test_percentiles_are_interpolated() -> None:
    numbers = Measurement(tuple(float(i) for i in range(11)), 0.0, "ours")
    assert [numbers.percentile(p) for p in (20, 50, 80)] == [2.0, 5.0, 8.0]
    assert Measurement((3.0, 1.0), 0.0, "ours").percentile(20) == pytest.approx(1.4)
    assert [Measurement((7.0,), 0.0, "peer").percentile(p) for p in (20, 50, 80)] == [7.0] * 3


def test_contenders_take_turns_evenly() -> None:
    order = list(harness.turns([4, 4]))
    assert order == [0, 1, 1, 0, 0, 1, 1, 0]
    order = list(harness.turns([12, 3, 6]))
    assert Counter(order) == {0: 12, 1: 3, 2: 6}
    assert [i for i, who in enumerate(order) if who == 1] == sorted(i for i, who in enumerate(order) if who == 1)
    thirds = [order[:7], order[7:14], order[14:]]
    assert all(1 in third for third in thirds), "the slow one is spread over the run"
    assert list(harness.turns([0, 2])) == [1, 1]
    assert list(harness.turns([])) == []


def test_sample_counts_share_the_time() -> None:
    assert harness.sample_counts([1.0, 100.0], seconds=1.0, least=3, most=200) == [200, 5]
    assert harness.sample_counts([1.0, 1e6], seconds=1.0, least=3, most=400) == [400, 3]


def test_copies_exceed_the_cache_twice() -> None:
    assert harness.copies_needed(10, 100) == 20
    assert harness.copies_needed(10**9, 100) == 2
    assert harness.copies_needed(1, 10**9) == 256
    assert harness.cache_bytes(CPU) > 1 << 17


def test_inputs_rotate_through_copies() -> None:
    seen: set[int] = set()

    def prepare(given: harness.Inputs) -> harness.Call:
        def call() -> torch.Tensor:
            seen.add(given["x"].data_ptr())
            return given["x"]

        return call

    case = Case("kernel", "", 0, 0, 0, "", "", harness.cache_bytes(CPU) // 2, 0, "copy")
    contender = Contender("x", prepare, lambda given: (given["x"],), ours=True)
    harness.measure(Benchmark(case, inputs, (contender,), 0.05), CPU)
    assert len(seen) == 4


def test_the_slower_contender_measures_slower() -> None:
    result = measured(doubles(ours=True, name="fast"), doubles(delay=0.01, name="slow"))
    assert result.ours == "fast"
    assert result.best_peer == "slow"
    assert goals.total_ratio([result], "fast", "slow") > 5
    assert goals.total_ratio([result, Result(CASE)], "fast", "slow") is None


def test_a_wrong_result_is_noticed_and_not_timed() -> None:
    result = measured(doubles(ours=True, name="right"), doubles(2.001, name="wrong"), doubles(2.001, name="near"))
    assert "6 of 6" not in result.wrong["wrong"]  # 0 is 0 times anything
    assert "5 of 6 values differ" in result.wrong["wrong"]
    assert set(result.measured) == {"right"}
    close = measured(doubles(2.001, tolerance=1e-3, ours=True, name="close"))
    assert not close.wrong
    far = measured(doubles(2.01, tolerance=1e-3, ours=True, name="far"))
    assert "error" in far.wrong["far"]


def test_nan_and_shapes_are_wrong() -> None:
    expected = (torch.ones(2, 2),)
    assert harness.difference((torch.full((2, 2), torch.nan),), expected, 0.1) is not None
    assert harness.difference((torch.ones(2, 3),), expected, 0.1) is not None
    assert harness.difference((torch.ones(2, 2, dtype=torch.float64),), expected, 0.0) is not None
    assert harness.difference((torch.ones(5, 2),), expected, 0.0) is None, "first rows are compared"
    assert harness.difference((), expected, 0.0) is not None


def test_peers_may_be_absent_and_ours_may_not_fail() -> None:
    expected = lambda given: (given["x"],)  # noqa: E731
    result = measured(
        doubles(ours=True, name="ours"),
        Contender("library", missing, expected),
        Contender("peer", refusing, expected),
        Contender("kernel", refusing, expected, ours=True),
        Contender("form", missing, expected, ours=True),
    )
    assert result.absent == {
        "library": "no such library",
        "peer": "RuntimeError: this shape is refused",
        "form": "no such library",
    }
    assert result.wrong == {"kernel": "RuntimeError: this shape is refused"}
    assert set(result.measured) == {"ours"}


def test_what_is_added_is_part_of_the_time() -> None:
    step = doubles(ours=True, name="step", plus=("preparation", 0.25))
    result = measured(step, doubles(delay=0.02, name="preparation", ours=True))
    assert result.milliseconds("step") > 0.25 * 20
    without = measured(step)
    assert not without.measured, "a time that lacks a part is no time"
    assert "'preparation', a part of it" in without.absent["step"]


def test_raw_parts_are_no_peers() -> None:
    result = measured(doubles(ours=True, name="ours"), doubles(name="bare product", raw=True))
    assert result.best_peer is None
    assert result.measured["bare product"].role == "raw"
    rows = {row["contender"]: row for row in records.rows(result, WHERE, {"copy": 1e6})}
    assert all(rows["ours"][column] for column in ("gb_per_s", "tflop_per_s", "share"))
    assert not any(rows["bare product"][column] for column in ("gb_per_s", "tflop_per_s", "share"))


def test_a_part_of_ours_may_not_fail() -> None:
    result = measured(Contender("part", refusing, lambda given: (given["x"],), ours=True, raw=True))
    assert "part" in result.wrong


def test_a_very_slow_peer_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_PATIENCE", 5.0)
    result = measured(doubles(ours=True, delay=0.01, name="ours"), doubles(delay=0.01, name="slow"))
    assert len(result.measured["slow"].samples) == 1
    assert len(result.measured["ours"].samples) >= 3


def test_rows_are_appended_once_each_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    result = Result(CASE, {"a": Measurement((1.0, 2.0, 3.0), 0.0, "ours"), "b": Measurement((4.0,), 0.5, "peer")})
    for _ in range(2):
        records.append(path, list(records.rows(result, WHERE, {"copy": 1e6})))
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert path.read_text().count("timestamp") == 1
    assert [row["contender"] for row in read] == ["a", "b", "a", "b"]
    assert set(read[0]) == set(records.COLUMNS)
    row = read[1]
    assert (row["p50_ms"], row["times_ours"], row["role"], row["samples"]) == ("4.0000", "2.000", "peer", "1")
    assert (row["gb_per_s"], row["tflop_per_s"], row["share"]) == ("0.00", "0.0000", "0.250")
    path.write_text("something,else\n")
    with pytest.raises(ValueError, match="other columns"):
        records.append(path, [])


def test_the_table_judges_goals() -> None:
    result = Result(CASE, {"a": Measurement((2.0,), 0.0, "ours"), "b": Measurement((4.0,), 0.0, "peer")})
    run = goals.Measured([result], {"copy": 1e6}, "a CPU")
    wanted = {
        "kernel": (
            goals.Goal("a over b", 1.5, lambda m: goals.total_ratio(m.of("kernel"), "a", "b")),
            goals.Goal("share", 0.8, lambda m: goals.least_share(m.of("kernel"), "a", m.ceilings), percent=True),
            goals.Goal("unknown", 2.0, lambda _: None),
        ),
        "other": (goals.Goal("x", 1.0, lambda _: 5.0),),
    }
    lines = list(goals.table(wanted, run, {"other": "no CUDA device"}))
    assert lines[0].split()[0] == "kernel"
    assert "2.000" in lines[1]
    assert "4.000 b" in lines[1]
    assert lines[1].endswith("yes, 2.00x")
    assert lines[2].endswith("NO, 50%")
    assert lines[3].split() == ["unknown", ">=", "2.00x", "not", "measured"]
    assert "not measured: no CUDA device" in lines[4]
    assert lines[4].endswith("not measured")


def test_geometric_mean() -> None:
    assert goals.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert goals.geometric_mean([1.0, None]) is None
    assert goals.geometric_mean([]) is None
