"""The command, as people call it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import harness
import pytest
import run
import torch
from goals import Goal
from shapes import MODELS
from time_limit import LIMIT_SECONDS

SCRIPT = Path(run.__file__)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)  # the script finds sbn_kernels by itself
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=LIMIT_SECONDS)


def test_help_has_an_example() -> None:
    result = bench("--help")
    assert result.returncode == 0
    assert "example:" in result.stdout
    assert "--budget" in result.stdout


@pytest.mark.parametrize("arguments", [("--kernels", "nothing"), ("--models", "70b"), ("--tokens", "0")])
def test_mistakes_are_named(arguments: tuple[str, str]) -> None:
    result = bench(*arguments)
    assert result.returncode == 2
    assert arguments[0] in result.stderr


def test_a_small_run_leaves_no_rows_and_ends_with_the_table() -> None:
    before = run.RESULTS.read_bytes() if run.RESULTS.exists() else None
    result = bench("--device", "cpu", "--kernels", "cpu_weights", "decode", "--budget", "5", "--no-record")
    assert result.returncode == 0, result.stderr
    assert (run.RESULTS.read_bytes() if run.RESULTS.exists() else None) == before
    lines = result.stdout.splitlines()
    assert "torch" in lines[1]
    assert lines[2].startswith("kernel")
    assert lines[3].startswith("cpu_weights  ")
    assert "masks and codes over argsort + scatter" in lines[3]
    assert lines[4].startswith("decode       not measured: no CUDA device")


def test_no_case_is_started_after_the_budget() -> None:
    result = bench("--device", "cpu", "--kernels", "cpu_weights", "--budget", "0", "--no-record")
    assert result.returncode == 0
    assert "cpu_weights: gate 4864x896 6:8 float32: not measured: budget" in result.stderr
    assert "not measured: budget" in result.stdout


def fake_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float) -> tuple[int, Path]:
    """A run over one made-up kernel that should double its input; exit status and the file of rows."""
    case = harness.Case("made_up", "x", 1, 1, 1, "", "float32", 8, 2, "copy")
    contender = harness.Contender(
        "ours", lambda given: lambda: given["x"] * scale, lambda given: (given["x"] * 2,), ours=True
    )
    module = SimpleNamespace(DEVICE="cpu", GOALS=(Goal("speed", 1.0, lambda _: 2.0),))
    module.benchmarks = lambda selection: iter(
        [harness.Benchmark(case, lambda: {"x": torch.ones(4)}, (contender,), 0.01)]
    )
    path = tmp_path / "results.csv"
    monkeypatch.setattr(run, "RESULTS", path)
    monkeypatch.setattr(run, "KERNELS", ("made_up",))
    monkeypatch.setattr(run, "measure_ceilings", lambda *_: None)
    monkeypatch.setitem(sys.modules, "made_up", module)
    return run.main(["--device", "cpu"]), path


def test_a_run_records_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, path = fake_run(tmp_path, monkeypatch, 2.0)
    assert status == 0
    assert len(path.read_text().splitlines()) == 2
    assert "yes, 2.00x" in capsys.readouterr().out
    fake_run(tmp_path, monkeypatch, 2.0)
    assert len(path.read_text().splitlines()) == 3


def test_a_wrong_result_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, path = fake_run(tmp_path, monkeypatch, 3.0)
    assert status == 1
    assert "WRONG: made_up x 1x1x1 float32, ours: tensor 0: 4 of 4 values differ" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) <= 1


def test_shapes_are_those_of_the_models() -> None:
    shapes = {layer.name: (layer.out_features, layer.in_features, layer.parts) for layer in MODELS["3b"].linears}
    assert shapes["3b.qkv"] == (2560, 2048, (2048, 256, 256))
    assert shapes["3b.o"] == (2048, 2048, (2048,))
    assert shapes["3b.gate_up"] == (22016, 2048, (11008, 11008))
    assert shapes["3b.down"] == (2048, 11008, (2048,))
    assert all(layer.in_features % 8 == 0 for model in MODELS.values() for layer in model.linears)
