"""The README's torchrun lines, with fewer ranks; and what a wrong number of ranks costs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from time_limit import LIMIT_SECONDS
from tiny_run import at_import

from megatron_sbn.data.shards import ShardWriter
from megatron_sbn.runs.metrics_file import read_metrics
from megatron_sbn.runs.status import read_status

STEPS = 3
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    writer = ShardWriter(folder / "tokens.bin", folder / "tokens.idx", 128)
    writer.add(np.random.default_rng(0).integers(0, 128, 500))
    writer.finish()
    path = folder / "tiny.yaml"
    path.write_text(
        f"""name: tiny
model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, seq_length: 16, vocab_size: 128,
  bf16: false}}
data: {{train: {folder}/tokens}}
training: {{steps: {STEPS}, global_batch_size: 2, micro_batch_size: 1}}
tracking: {{enabled: false}}
"""
    )
    return path


def start(recipe: Path, *words: str, **variables: str) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.Popen(
        [*TORCHRUN, *words], cwd=recipe.parent, env=environment | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def trained(run: Path) -> None:
    status = read_status(run)
    assert status is not None
    assert (status.state, status.step) == ("FINISHED", STEPS)
    assert "on 2 cpu ranks" in (run / "logs" / "rank-0.log").read_text()
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line] == [1, 2, 3]


def test_one_machine(recipe: Path) -> None:
    train = ["-m", "megatron_sbn.train", str(recipe), "parallel.pipeline=2", "run_dir=one"]
    process = start(recipe, "--nproc-per-node", "2", *train)
    said, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, said
    trained(recipe.parent / "one")


@pytest.mark.slow
def test_torchrun_that_is_ended_while_its_ranks_import_the_engines(recipe: Path, tmp_path: Path) -> None:
    """torchrun passes SIGTERM on and waits; the rank's import goes on when the signal is there."""
    path = at_import(tmp_path / "hook", "os.kill(os.getppid(), signal.SIGTERM); time.sleep(2)", ("0",))
    train = ["-m", "megatron_sbn.train", str(recipe), "parallel.tensor=2", "run_dir=ended"]
    # Imports may take longer than the default of 30 s.
    words = ["--nproc-per-node", "2", "--shutdown-timeout", f"{LIMIT_SECONDS:.0f}"]
    process = start(recipe, *words, *train, PYTHONPATH=str(path))
    said, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode != 0
    status = read_status(recipe.parent / "ended")
    assert status is not None, said
    assert (status.state, status.reason, status.exit_status, status.step) == ("STOPPED", "SIGTERM", 75, 0)


@pytest.mark.slow
def test_torchrun_starts_a_run_anew_when_a_rank_dies(recipe: Path) -> None:
    """The same command, once with a rank that is killed in its third step: all steps once, the same losses."""
    words = ["parallel.tensor=2", "checkpoint.interval=1", "training.telemetry_interval=0"]
    losses = {}
    for name, fault in (("killed", "kill:1:2"), ("undisturbed", "none:1:0")):
        module = ["-m", "faulty_rank", str(recipe), f"run_dir={name}", *words]
        python = str(Path(__file__).parent)
        process = start(recipe, "--nproc-per-node", "2", "--max-restarts", "1", *module, FAULT=fault, PYTHONPATH=python)
        said, _ = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == 0, said
        trained(recipe.parent / name)
        lines = read_metrics(recipe.parent / name / "metrics.jsonl")
        losses[name] = [(line["step"], line["loss"]) for line in lines if "loss" in line]
        assert ("continues after step" in said) == (name == "killed")
    assert losses["killed"] == losses["undisturbed"]


@pytest.mark.slow
def test_two_machines(recipe: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    train = ["-m", "megatron_sbn.train", str(recipe), "parallel.tensor=2", "run_dir=two"]
    # Both are this machine: that its name can be reached from itself is not what this is about.
    machines = [start(recipe, *words, "--local-addr", "127.0.0.1", *train) for _ in range(2)]
    said = [machine.communicate(timeout=LIMIT_SECONDS)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(said)
    trained(recipe.parent / "two")


def test_a_wrong_number_of_ranks_is_one_line(recipe: Path) -> None:
    process = start(
        recipe, "--nproc-per-node", "2", "-m", "megatron_sbn.train", str(recipe), "parallel.tensor=4", "run_dir=none"
    )
    said, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 1  # torchrun's own, whatever a rank's was
    message = "parallel.tensor = 4 x parallel.pipeline = 1 needs a multiple of 4 ranks, and 2 were started; start 4"
    (line,) = [line for line in said.splitlines() if line.startswith("sbn: ")]
    assert message in line
    assert "exitcode  : 2 " in said
    command = [sys.executable, "-m", "megatron_sbn.cli", "train", str(recipe), "parallel.tensor=4", "run_dir=none"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2"],
        cwd=recipe.parent, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
    assert not (recipe.parent / "none").exists()
