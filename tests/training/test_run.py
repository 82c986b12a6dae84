"""Whole runs as a user starts them: `sbn prepare`, `sbn train`, kill -9, the same command again, and what goes wrong.

Two ranks (tensor-parallel 2, sequence parallel), a corpus of this project's own sources.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from time_limit import LIMIT_SECONDS

from megatron_sbn.runs.metrics_file import read_metrics
from megatron_sbn.runs.status import read_status

ROOT = Path(__file__).parents[2]
STEPS, INTERVAL = 9, 3
CLOCKED = ("time", "tokens_per_second", "model_flops_per_second_dense", "model_flops_per_second_sparse")
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    done = sbn(
        "prepare", "--input", str(ROOT / "megatron_sbn" / "**" / "*.py"), "--output", str(folder / "own"),
        "--vocab-size", "600", "--validation-fraction", "0.2", "--workers", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = folder / "tiny.yaml"
    path.write_text(
        f"""name: tiny
model: {{num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, num_query_groups: 2,
  seq_length: 32, vocab_size: 600, bf16: false}}
linear: {{mask_interval: 2}}
parallel: {{tensor: 2}}
data: {{train: {folder}/own-train, validation: {folder}/own-validation}}
optimizer: {{lr: 6e-3, lr_warmup_steps: 2}}
training: {{steps: {STEPS}, global_batch_size: 4, micro_batch_size: 2, validation_interval: 4, validation_samples: 8,
  telemetry_interval: 2}}
checkpoint: {{interval: {INTERVAL}}}
tracking: {{uri: "{UNREACHABLE}"}}
"""
    )
    return path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatron_sbn.cli", *arguments]


def sbn(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)


def comparable(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock decides."""
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in read_metrics(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path) -> tuple[Path, str]:
    run = recipe.parent / "whole"
    done = sbn("train", str(recipe), f"run_dir={run}")
    assert done.returncode == 0, done.stderr
    return run, done.stdout + done.stderr


def test_a_run_leaves_what_its_folder_promises(uninterrupted: tuple[Path, str]) -> None:
    run, printed = uninterrupted
    lines = comparable(run)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "validation_perplexity" in line] == [4, 8, 9]
    assert [line["step"] for line in lines if "natural_zero_fraction" in line] == [0, 2, 4, 6, 8, 9]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(math.log(640), abs=0.2)  # near uniform over the padded vocabulary
    assert losses[-1] < losses[0] - 0.1
    for line in lines:
        if "validation_loss" in line:
            assert line["validation_perplexity"] == pytest.approx(math.exp(line["validation_loss"]))
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{STEPS:08d}"
    assert len(list((run / "checkpoints").glob("step-*"))) == 2
    assert f"step {STEPS}/{STEPS}" in (run / "logs" / "rank-0.log").read_text()
    said = (run / "logs" / "rank-0.log").read_text().splitlines()
    opening = said[: next(index for index, line in enumerate(said) if line.startswith("step 0"))]
    assert len(opening) <= 20
    rows = ("model", "layout", "batch", "linear", "tokens", "data", "lr", "memory", "saving", "mlflow")
    named = [line.split()[0] for line in opening if line.startswith("  ")]
    assert [name for name in named if name != "kernels"] == list(rows)
    assert named.count("kernels") == 4
    assert said[-5] == f"done: {STEPS} steps; run folder {run}"
    assert said[-4].startswith("  validation perplexity ")
    assert "token frequencies alone: perplexity " in said[-4]
    assert str(run / "checkpoints" / f"step-{STEPS:08d}") in said[-2]
    assert said[0] in printed
    again = sbn("train", str(run / "recipe.yaml"), "checkpoint.resume=never")
    assert again.returncode == 4  # the resolved recipe is a recipe, and names this folder
    assert "holds a run already" in again.stderr


def test_bytes_are_those_of_a_step_and_of_groups_that_exist(uninterrupted: tuple[Path, str]) -> None:
    """The same at every step, so nothing of the validation at 4, the telemetry and the checkpoints is among them."""
    lines = [line for line in comparable(uninterrupted[0]) if "loss" in line]
    assert len(lines) == STEPS
    # Forward and backward gather and reduce at least the tokens of every layer, on both ranks.
    assert {line["bytes_tensor"] for line in lines} == {lines[0]["bytes_tensor"]}
    assert lines[0]["bytes_tensor"] > 2 * 2 * 4 * 64 * 32 * 2
    assert {key for line in lines for key in line if key.startswith("bytes_")} == {"bytes_tensor"}


def test_mlflow_out_of_reach_is_reported_once_and_stops_nothing(uninterrupted: tuple[Path, str]) -> None:
    run, printed = uninterrupted
    warnings = [line for line in printed.splitlines() if UNREACHABLE in line and "cannot be reached" in line]
    assert len(warnings) == 1
    assert json.loads((run / "tracking.json").read_text())["status"] == "FINISHED"


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(recipe: Path, uninterrupted: tuple[Path, str]) -> None:
    run = recipe.parent / "killed"
    start = command("train", str(recipe), f"run_dir={run}")
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as launcher:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            if line.startswith(f"step {INTERVAL + 2}/"):
                break
        launcher.send_signal(signal.SIGKILL)
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{INTERVAL:08d}"
    await_end_of_ranks(run)
    done = sbn(*start[3:])
    assert done.returncode == 0, done.stderr
    assert f"continues after step {INTERVAL}" in done.stdout
    assert comparable(run) == comparable(uninterrupted[0])


def await_end_of_ranks(run: Path) -> None:
    """The ranks of a killed launcher are killed with it; the kernel may take a moment."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        if not any(str(run).encode() in words for words in process_command_lines()):
            return
        time.sleep(0.1)
    pytest.fail("ranks outlived their launcher")


def process_command_lines() -> list[bytes]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                found.append((entry / "cmdline").read_bytes())
            except OSError:  # it ended meanwhile
                continue
    return found


@pytest.mark.parametrize(
    ("overrides", "status", "message"),
    [
        (["model.hiden_size=64"], 2, "did you mean model.hidden_size?"),
        pytest.param(["data.train=/nowhere/shard"], 2, "/nowhere/shard", marks=pytest.mark.slow),
        pytest.param(["checkpoint.resume=required"], 4, "there is no checkpoint", marks=pytest.mark.slow),
        (
            ["optimizer.lr=1e30", "optimizer.clip_grad=0", "optimizer.lr_warmup_steps=0"],
            3,
            "step 2: gradient norm is inf",
        ),
    ],
)
def test_a_failure_is_one_line_and_its_own_status(
    recipe: Path, tmp_path: Path, overrides: list[str], status: int, message: str
) -> None:
    done = sbn("train", str(recipe), "tracking.enabled=false", f"run_dir={tmp_path / 'run'}", *overrides)
    assert done.returncode == status, done.stderr
    rows = [line for line in done.stderr.splitlines() if message in line]
    assert rows
    assert all(line.startswith("sbn: ") for line in rows)
    assert "Traceback" not in done.stderr
    if status == 3:  # of a run that had begun, and tells it in its folder as well
        ended = read_status(tmp_path / "run")
        assert ended is not None
        assert (ended.state, ended.exit_status) == ("FAILED", 3)
        assert ended.reason.startswith(message)


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(recipe: Path) -> None:
    run = recipe.parent / "busy"
    start = command("train", str(recipe), f"run_dir={run}", "tracking.enabled=false", "training.steps=2000")
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as first:
        assert first.stdout is not None
        assert any(line.startswith("step 1/") for line in first.stdout)
        second = sbn("train", str(recipe), f"run_dir={run}", "tracking.enabled=false")
        first.terminate()
    assert second.returncode == 2
    assert "another process trains in it" in second.stderr
