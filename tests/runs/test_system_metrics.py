"""Samples of the machine: in the run folder first, then in MLflow, each once; never in training's way."""

import logging
import socket
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from time_limit import LIMIT_SECONDS

from megatron_sbn.cli import main
from megatron_sbn.runs.folder import SYSTEM_METRICS
from megatron_sbn.runs.metrics_file import MetricsFile, read_metrics
from megatron_sbn.runs.system_metrics import Machine, sampled
from megatron_sbn.tracking.tracker import Tracker

CPU = "system/cpu_utilization_percentage"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    MetricsFile(folder / "metrics.jsonl").append(3, {"loss": 1.0})
    return folder


def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    program = tools / "nvidia-smi"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")


def samples(run_dir: Path, name: str = CPU) -> list[tuple[float, float, float]]:
    """(step, timestamp in ms, value) of the file."""
    lines = read_metrics(run_dir / SYSTEM_METRICS)
    return [(line["step"], int(line["time"] * 1000), line[name]) for line in lines if name in line]


def delivered(uri: str, name: str = CPU) -> list[tuple[float, float, float]]:
    """The same of MLflow's only run."""
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    points = client.get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.timestamp, point.value) for point in points)


def start(run_dir: Path, uri: str) -> Tracker:
    return Tracker(run_dir, "run", "study", uri, {}, {}, [], poll_seconds=0.05)


def test_samples_are_of_this_machine(run_dir: Path) -> None:
    with sampled(run_dir, 0.1):
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            pass
    lines = read_metrics(run_dir / SYSTEM_METRICS)
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert len(lines) >= 3
    assert all(0 < line[CPU] <= 100 for line in lines)
    memory = psutil.virtual_memory()
    assert lines[-1]["system/system_memory_usage_megabytes"] == pytest.approx(memory.used / 1e6, rel=0.5)
    assert lines[-1]["system/rank_0_memory_megabytes"] == pytest.approx(psutil.Process().memory_info().rss / 1e6, 0.2)
    assert 0 < lines[-1]["system/system_memory_usage_percentage"] < 100


def test_switched_off(run_dir: Path) -> None:
    with sampled(run_dir, 0.0):
        pass
    assert not (run_dir / SYSTEM_METRICS).exists()


def test_a_run_that_ends_before_the_first_interval_has_a_sample_and_a_new_start_counts_on(run_dir: Path) -> None:
    for _ in range(3):
        with sampled(run_dir, 3600.0):
            pass
    assert [step for step, _, _ in samples(run_dir)] == [0, 1, 2]


def test_gpus(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = r"0, 87, 1000, 80000, 350.50, 700.00\n1, [N/A], 2000, 80000, [N/A], 700.00\n"
    nvidia_smi(tmp_path, monkeypatch, f"echo \"$@\" > {tmp_path}/asked; printf '{rows}'")
    sampled = {name: value for name, value in Machine().sample().items() if "gpu" in name}
    assert sampled == {
        "system/gpu_0_utilization_percentage": 87.0,
        "system/gpu_0_memory_usage_megabytes": 1048.6,
        "system/gpu_0_memory_usage_percentage": 1.2,
        "system/gpu_0_power_usage_watts": 350.5,
        "system/gpu_0_power_usage_percentage": 50.1,
        "system/gpu_1_memory_usage_megabytes": 2097.2,
        "system/gpu_1_memory_usage_percentage": 2.5,
    }
    assert (tmp_path / "asked").read_text().split()[1:] == ["--format=csv,noheader,nounits"]


def test_a_driver_that_fails_is_reported_once_and_the_rest_goes_on(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "exit 9")
    machine = Machine()
    assert CPU in machine.sample()
    assert CPU in machine.sample()
    (record,) = caplog.records
    assert "no more GPU metrics of this start: " in record.getMessage()
    assert "exit status 9" in record.getMessage()


@pytest.mark.parametrize("content", [None, "nonsense\n"])
def test_what_cannot_be_written_is_a_warning(
    run_dir: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if content is None:
        (run_dir / SYSTEM_METRICS).mkdir()
    else:
        (run_dir / SYSTEM_METRICS).write_text(content)
    with caplog.at_level(logging.WARNING), sampled(run_dir, 3600.0):
        pass
    (record,) = caplog.records
    assert record.getMessage().startswith(f"no more system metrics of this start: {run_dir / SYSTEM_METRICS}")


def test_mlflow_has_every_sample_once_after_a_new_start(run_dir: Path, uri: str) -> None:
    for _ in range(2):
        tracker = start(run_dir, uri)
        with sampled(run_dir, 0.1):
            time.sleep(0.35)
        assert tracker.close("KILLED")
        assert delivered(uri) == samples(run_dir)
    assert [step for step, _, _ in delivered(uri)] == list(range(len(samples(run_dir))))
    assert len(samples(run_dir)) >= 4
    assert [step for step, _, _ in delivered(uri, "loss")] == [3]


def test_what_was_sampled_while_mlflow_was_away_is_delivered_later(
    run_dir: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    away = start(run_dir, f"http://127.0.0.1:{port}")
    with sampled(run_dir, 0.1):
        time.sleep(0.25)
    assert not away.close("FINISHED", timeout=LIMIT_SECONDS)
    for _ in range(2):
        assert main(["sync", str(run_dir), "--uri", uri]) == 0
    assert "delivered to MLflow run " in capsys.readouterr().out
    assert delivered(uri) == samples(run_dir) != []
