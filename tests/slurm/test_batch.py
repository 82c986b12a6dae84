"""Batch scripts on a real Slurm: two nodes, checkpoint and requeue, failure budget, arrays, scancel, kill switch."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import ROOT, STEPS, write_recipe
from time_limit import LIMIT_SECONDS
from tiny_run import at_import

from megatron_sbn.cluster.attempts import read_attempts
from megatron_sbn.runs.metrics_file import read_metrics
from megatron_sbn.runs.status import RunStatus, read_status

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("jobs"))


def submit(cluster: Cluster, recipe: Path, *words: str, nodes: int = 2, **variables: str) -> str:
    variables |= {"SBN_ENV": f"{recipe.parent}/env.sh", "SBN_CODE": str(ROOT), "SBN_LOGS": str(recipe.parent)}
    export = ",".join(["--export=ALL", *(f"{name}={value}" for name, value in variables.items())])
    command = ["sbatch", "--parsable", f"--nodes={nodes}", "--time=20", f"--output={recipe.parent}/%x-%A.out", export]
    return cluster.output(*command, str(ROOT / "slurm" / "train.sbatch"), str(recipe), *words)


def status_of(run: Path) -> RunStatus:
    status = read_status(run)
    assert status is not None
    return status


def losses(run: Path) -> list[tuple[float, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def await_step(run: Path, step: int, seconds: float = LIMIT_SECONDS) -> None:
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
    # Beside the job, which waits for some seconds before it starts again.
    command = [sys.executable, "-m", "megatron_sbn.cli", "train", str(recipe), f"run_dir={whole}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as undisturbed:
        said, _ = undisturbed.communicate(timeout=LIMIT_SECONDS)
    assert undisturbed.returncode == 0, said
    fields = cluster.await_end(job, LIMIT_SECONDS)
    assert (fields["JobState"], fields["Restarts"], fields["NumNodes"]) == ("COMPLETED", "1", "2"), printed(recipe)
    states = [(attempt.state, attempt.reason) for attempt in read_attempts(run)]
    assert states == [("STOPPED", "SIGUSR1"), ("FINISHED", "")]
    assert "on 2 cpu ranks" in (run / "logs" / "rank-0.log").read_text()
    for node in range(2):
        log = (recipe.parent / f"sbn-{job}-node-{node}.log").read_text()
        assert f"job {job} restart 0 node {node}" in log
        assert f"job {job} restart 1 node {node}" in log
    assert len(losses(whole)) == STEPS
    assert losses(run) == losses(whole)
    again = submit(cluster, recipe, f"run_dir={run}")
    assert cluster.await_end(again, LIMIT_SECONDS)["JobState"] == "COMPLETED"
    assert "finished already" in printed(recipe)
    assert len(read_attempts(run)) == 2


def test_scancel_leaves_a_checkpoint_and_the_kill_switch_keeps_jobs_from_starting(
    cluster: Cluster, recipe: Path
) -> None:
    run = recipe.parent / "cancelled"
    job = submit(cluster, recipe, f"run_dir={run}", "training.steps=100000")
    await_step(run, 20)
    cluster.output("scancel", job)
    fields = cluster.await_end(job, LIMIT_SECONDS)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
    status = status_of(run)
    assert (status.state, status.reason) == ("STOPPED", "SIGTERM"), printed(recipe)
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{status.step:08d}"
    (run / "STOP").touch()
    job = submit(cluster, recipe, f"run_dir={run}", "training.steps=100000")
    assert cluster.await_end(job, LIMIT_SECONDS)["JobState"] == "COMPLETED"
    assert status_of(run) == status


# Through the batch script, srun and the launcher to the rank, which waits for it in the middle of its imports.
ASK = 'subprocess.Popen(["scancel", "--signal=USR1", "--batch", os.environ["SLURM_JOB_ID"]]); time.sleep(3)'


@pytest.fixture(scope="module")
def given_up(cluster: Cluster, recipe: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Two jobs of one node that are started again until it is enough, side by side; their fields at the end.

    asked: a stop at every start, while it imports the engines. failing: its metrics.jsonl is a folder, which rank
    0 cannot open; that is status 1 at every start.
    """
    (recipe.parent / "failing" / "metrics.jsonl").mkdir(parents=True)
    words = {name: (f"run_dir={recipe.parent / name}", "parallel.tensor=1") for name in ("asked", "failing")}
    hook = at_import(recipe.parent / "hook", ASK, ("0",))
    asked = submit(cluster, recipe, *words["asked"], nodes=1, SBN_MAX_RESTARTS="1", PYTHONPATH=str(hook))
    failing = submit(cluster, recipe, *words["failing"], nodes=1, SBN_MAX_FAILURES="2")
    return cluster.await_end(asked, LIMIT_SECONDS), cluster.await_end(failing, LIMIT_SECONDS)


def test_a_job_that_is_asked_to_stop_at_every_start_ends_after_its_restarts(
    given_up: tuple[dict[str, str], dict[str, str]], recipe: Path
) -> None:
    run, said = recipe.parent / "asked", printed(recipe)
    fields, _ = given_up
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "1"), said
    attempts = [(a.restart, a.state, a.reason, a.exit_status, a.checkpoint) for a in read_attempts(run)]
    assert attempts == [(0, "STOPPED", "SIGUSR1", 75, 0), (1, "STOPPED", "SIGUSR1", 75, 0)], said
    assert f"{run}: starts again: asked to stop (SIGUSR1); no step was saved" in said
    limit = "restarted 1 times, which is the limit (SBN_MAX_RESTARTS); no step was saved; submit it again to go on"
    assert f"{run}: ends: {limit}" in said
    status = status_of(run)
    assert (status.state, status.exit_status, status.step, status.restart) == ("STOPPED", 75, 0, 1)


def test_a_job_that_fails_again_and_again_ends_after_its_budget(
    given_up: tuple[dict[str, str], dict[str, str]], recipe: Path
) -> None:
    _, fields = given_up
    said = printed(recipe)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "1"), said
    assert [attempt.state for attempt in read_attempts(recipe.parent / "failing")] == ["FAILED"] * 2
    assert f"{recipe.parent / 'failing'}: starts again: failure 1 of at most 2 in a row: " in said
    assert f"{recipe.parent / 'failing'}: ends: 2 failures in a row (SBN_MAX_FAILURES); the last: " in said


def test_what_would_fail_again_is_not_started_again(cluster: Cluster, recipe: Path) -> None:
    broken = at_import(recipe.parent / "broken", 'raise ImportError("libcudart is not there")', ("0",))
    bad = {"import": (f"PYTHONPATH={broken}", ""), "shards": ("", "data.train=/nowhere/tokens")}
    jobs = {}
    for name, (variable, word) in bad.items():
        words = [f"run_dir={recipe.parent / name}", "parallel.tensor=1", *filter(None, [word])]
        variables = dict([variable.split("=", 1)]) if variable else {}
        jobs[name] = submit(cluster, recipe, *words, nodes=1, **variables)
    reasons = {"import": "cannot import the engines (libcudart is not there)", "shards": "/nowhere/tokens"}
    for name, job in jobs.items():
        fields = cluster.await_end(job, LIMIT_SECONDS)
        assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0"), printed(recipe)
        assert f"{recipe.parent / name}: ends: status 2 would come again: " in printed(recipe)
        assert reasons[name] in printed(recipe)
