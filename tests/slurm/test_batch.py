"""Batch scripts on a real Slurm: two nodes, checkpoint and requeue, failure budget, arrays, scancel, kill switch."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import ROOT, STEPS, write_recipe

from megatron_sbn.cluster.attempts import read_attempts
from megatron_sbn.experiments.metrics import read_metrics
from megatron_sbn.run_status import RunStatus, read_status

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("jobs"))


def submit(cluster: Cluster, recipe: Path, *words: str, script: str = "train", options: tuple[str, ...] = ()) -> str:
    export = f"--export=ALL,SBN_ENV={recipe.parent}/env.sh,SBN_CODE={ROOT},SBN_LOGS={recipe.parent}"
    command = ["sbatch", "--parsable", "--nodes=2", "--time=20", f"--output={recipe.parent}/%x-%A.out", export]
    return cluster.output(*command, *options, str(ROOT / "slurm" / f"{script}.sbatch"), str(recipe), *words)


def status_of(run: Path) -> RunStatus:
    status = read_status(run)
    assert status is not None
    return status


def losses(run: Path) -> list[tuple[float, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def await_step(run: Path, step: int, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and (lines := losses(run)) and lines[-1][0] >= step:
            return
        time.sleep(0.1)
    pytest.fail(f"{run}: not at step {step} after {seconds} s")


def printed(recipe: Path) -> str:
    return "\n".join(path.read_text() for path in sorted([*recipe.parent.glob("*.out"), *recipe.parent.glob("*.log")]))


def test_a_signalled_job_of_two_nodes_starts_again_and_ends_with_the_losses_of_one_that_was_not(
    cluster: Cluster, recipe: Path
) -> None:
    run, whole = recipe.parent / "requeued", recipe.parent / "whole"
    job = submit(cluster, recipe, f"run_dir={run}")
    await_step(run, 20)
    cluster.output("scancel", "--signal=USR1", "--batch", job)
    fields = cluster.await_end(job, 240)
    assert (fields["JobState"], fields["Restarts"], fields["NumNodes"]) == ("COMPLETED", "1", "2"), printed(recipe)
    states = [(attempt.state, attempt.reason) for attempt in read_attempts(run)]
    assert states == [("STOPPED", "SIGUSR1"), ("FINISHED", "")]
    assert "on 2 cpu ranks" in (run / "logs" / "rank-0.log").read_text()
    for node in range(2):
        log = (recipe.parent / f"sbn-{job}-node-{node}.log").read_text()
        assert f"job {job} restart 0 node {node}" in log
        assert f"job {job} restart 1 node {node}" in log
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sbn.cli", "train", str(recipe), f"run_dir={whole}"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(losses(whole)) == STEPS
    assert losses(run) == losses(whole)
    again = submit(cluster, recipe, f"run_dir={run}")
    assert cluster.await_end(again, 240)["JobState"] == "COMPLETED"
    assert "finished already" in printed(recipe)
    assert len(read_attempts(run)) == 2


def test_scancel_leaves_a_checkpoint_and_the_kill_switch_keeps_jobs_from_starting(
    cluster: Cluster, recipe: Path
) -> None:
    run = recipe.parent / "cancelled"
    job = submit(cluster, recipe, f"run_dir={run}", "training.steps=100000")
    await_step(run, 20)
    cluster.output("scancel", job)
    fields = cluster.await_end(job, 240)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
    status = status_of(run)
    assert (status.state, status.reason) == ("STOPPED", "SIGTERM"), printed(recipe)
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{status.step:08d}"
    (run / "STOP").touch()
    job = submit(cluster, recipe, f"run_dir={run}", "training.steps=100000")
    assert cluster.await_end(job, 240)["JobState"] == "COMPLETED"
    assert status_of(run) == status


def test_a_job_that_fails_again_and_again_ends_after_its_budget(cluster: Cluster, recipe: Path) -> None:
    """metrics.jsonl is a folder here: rank 0 cannot open it, which is status 1 at every start."""
    run = recipe.parent / "failing"
    (run / "metrics.jsonl").mkdir(parents=True)
    job = submit(cluster, recipe, f"run_dir={run}")
    fields = cluster.await_end(job, 240)
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "2"), printed(recipe)
    assert [attempt.state for attempt in read_attempts(run)] == ["FAILED"] * 3
