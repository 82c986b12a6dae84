"""A run that is asked to stop: checkpointed at a step boundary, status 75, and going on with the same losses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from megatron_sbn.data.shards import ShardWriter
from megatron_sbn.errors import STOPPED
from megatron_sbn.experiments.metrics import read_metrics
from megatron_sbn.experiments.run_record import read_record
from megatron_sbn.run_status import read_status

STEPS = 300
VOCABULARY = 128


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer on two tensor-parallel ranks; it never checkpoints of itself."""
    folder = tmp_path_factory.mktemp("signals")
    writer = ShardWriter(folder / "tokens.bin", folder / "tokens.idx", VOCABULARY)
    generator = np.random.default_rng(0)
    for _ in range(50):
        writer.add(generator.integers(0, VOCABULARY, 100))
    writer.finish()
    path = folder / "tiny.yaml"
    path.write_text(
        f"""name: tiny
model: {{num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, seq_length: 16,
  vocab_size: {VOCABULARY}, bf16: false}}
parallel: {{tensor: 2}}
data: {{train: {folder}/tokens}}
training: {{steps: {STEPS}, global_batch_size: 2, micro_batch_size: 2, telemetry_interval: 50}}
tracking: {{uri: "sqlite:///{folder}/mlflow.db"}}
"""
    )
    return path


def start(recipe: Path, run: Path, *overrides: str) -> "subprocess.Popen[str]":
    words = ["train", str(recipe), f"run_dir={run}", *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_sbn.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def await_line(process: "subprocess.Popen[str]", beginning: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    pytest.fail(f"ended with {process.wait()} before {beginning!r}")


def losses(run: Path) -> list[tuple[float, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def history(run: Path, metric: str) -> list:  # type: ignore[type-arg]
    """Points that MLflow has."""
    record = read_record(run / "tracking.json")
    return sorted(MlflowClient(record.uri).get_metric_history(record.run_id, metric), key=lambda point: point.step)


def test_a_signalled_run_goes_on_with_the_same_losses(recipe: Path) -> None:
    """SIGUSR1, then SIGTERM, then to the end; beside a run that nobody disturbed."""
    run, whole = recipe.parent / "stopped", recipe.parent / "whole"
    for number, after in ((signal.SIGUSR1, "step 20/"), (signal.SIGTERM, "step 120/")):
        with start(recipe, run) as process:
            await_line(process, after)
            process.send_signal(number)
            process.communicate(timeout=120)
        assert process.returncode == STOPPED
        status = read_status(run)
        assert status is not None
        assert (status.state, status.exit_status, status.reason) == ("STOPPED", STOPPED, number.name)
        assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{status.step:08d}"
        assert losses(run)[-1][0] == status.step < STEPS
        assert read_record(run / "tracking.json").status == "KILLED"
    for folder in (run, whole):
        with start(recipe, folder) as process:
            printed, _ = process.communicate(timeout=200)
        assert process.returncode == 0, printed
    assert len(losses(whole)) == STEPS
    assert losses(run) == losses(whole)
    ended = read_status(run)
    assert ended is not None
    assert (ended.state, ended.exit_status, ended.step) == ("FINISHED", 0, STEPS)
    assert read_record(run / "tracking.json").status == "FINISHED"
    samples = read_metrics(run / "system_metrics.jsonl")
    assert [line["step"] for line in samples] == list(range(len(samples)))
    assert len(samples) >= 3  # one a start at least
    assert [point.step for point in history(run, "system/cpu_utilization_percentage")] == list(range(len(samples)))


def test_the_kill_switch_stops_a_run(recipe: Path) -> None:
    run = recipe.parent / "switched"
    with start(recipe, run, "training.steps=100000", "tracking.enabled=false") as process:
        await_line(process, "step 1/")
        (run / "STOP").touch()
        process.communicate(timeout=120)
    assert process.returncode == STOPPED
    status = read_status(run)
    assert status is not None
    assert (status.state, status.reason) == ("STOPPED", "STOP_FILE")


FROZEN = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from megatron_sbn.training.signals import StopRequest, listening
with listening(StopRequest(Path("."), SimpleNamespace()), float(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("deadline", "waits"), [("1.5", ()), ("0", (0.2, 5.5))])
def test_a_deadline_and_a_second_signal_force_the_exit(deadline: str, waits: tuple[float, ...]) -> None:
    """A process that never comes to a step boundary. A repetition at once is still the first request."""
    with subprocess.Popen([sys.executable, "-c", FROZEN, deadline], stdout=subprocess.PIPE, text=True) as process:
        await_line(process, "ready")
        process.send_signal(signal.SIGTERM)
        for seconds in waits:
            assert process.poll() is None
            time.sleep(seconds)
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM


def test_a_failure_is_told_in_the_run_folder(recipe: Path) -> None:
    run = recipe.parent / "failed"
    with start(recipe, run, "optimizer.lr=1e30", "optimizer.clip_grad=0", "tracking.enabled=false") as process:
        process.communicate(timeout=120)
    status = read_status(run)
    assert status is not None
    assert (process.returncode, status.state, status.exit_status) == (3, "FAILED", 3)
    assert status.reason.startswith("step 2: gradient norm is inf")
