"""`sbn submit` and `sbn sweep submit` on a real Slurm."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import write_recipe
from time_limit import LIMIT_SECONDS

from megatron_sbn.analysis.report import finished, read_study
from megatron_sbn.runs.metrics_file import read_metrics
from megatron_sbn.runs.status import read_status

pytestmark = pytest.mark.slurm
STEPS = 30


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a study 50%n #2")  # special in YAML and in Slurm's patterns
    # The Python that submits is not that of PATH, which has none of the packages.
    (folder / "bin").mkdir()
    for name in ("python", "python3"):
        (folder / "bin" / name).write_text("#!/bin/bash\necho the Python of PATH was started >&2; exit 1\n")
        (folder / "bin" / name).chmod(0o755)
    return write_recipe(folder, python="")


def sbn(cluster: Cluster, recipe: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """The command as on a login node, from the folder of the recipe."""
    # Bytecode is written, so that the code that ran can be identified.
    site = {"SBN_ENV": f"{recipe.parent}/env.sh", "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": ""}
    site["PATH"] = os.pathsep.join([f"{recipe.parent}/bin", cluster.environment["PATH"]])
    return subprocess.run(
        [sys.executable, "-m", "megatron_sbn.cli", *words],
        cwd=recipe.parent, env=os.environ | cluster.environment | site,
        capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip


def submitted(done: "subprocess.CompletedProcess[str]") -> str:
    found = re.search(r"submitted job (\d+)", done.stdout)
    assert found is not None, done.stderr
    return found[1]


def test_a_submitted_run_trains_on_two_nodes_from_its_copy_of_the_code(cluster: Cluster, recipe: Path) -> None:
    words = ["submit", str(recipe), "--nodes", "2", "--time", "10:00", "run_dir=runs/one", f"training.steps={STEPS}"]
    job = submitted(sbn(cluster, recipe, *words))
    waiting = sbn(cluster, recipe, *words)
    assert (waiting.returncode, waiting.stdout) == (2, "")
    assert f"its job {job} is still in the queue" in waiting.stderr
    run = recipe.parent / "runs" / "one"
    fields = cluster.await_end(job, LIMIT_SECONDS)
    said = (run / "logs" / f"slurm-{job}.out").read_text()
    assert (fields["JobState"], fields["NumNodes"], fields["JobName"]) == ("COMPLETED", "2", "tiny"), said
    assert len(read_metrics(run / "metrics.jsonl")) >= STEPS
    assert "on 2 cpu ranks" in (run / "logs" / "rank-0.log").read_text()
    for node in range(2):
        assert f"job {job} restart 0 node {node}" in (run / "logs" / f"sbn-{job}-node-{node}.log").read_text()
    code = run / "submissions" / "1" / "code"
    assert any((code / "megatron_sbn" / "training" / "__pycache__").glob("loop.*.pyc"))
    over = sbn(cluster, recipe, *words)
    assert over.returncode == 2
    assert f"finished already, {STEPS} steps" in over.stderr


def test_a_submitted_sweep_fills_a_study_and_exits_at_once_when_all_is_there(cluster: Cluster, recipe: Path) -> None:
    sweep = recipe.parent / "sweep.yaml"
    sweep.write_text(
        f"name: sparsities\nrecipe: tiny.yaml\nset: {{training.steps: {STEPS}}}\n"
        'axes: {linear.sparsity: ["8:8", "6:8", "2:4"]}\n'
    )
    words = ["sweep", "submit", str(sweep), "--at-most", "2", "--time", "10:00"]
    job = submitted(sbn(cluster, recipe, *words))
    for task in range(3):
        assert cluster.await_end(f"{job}_{task}", LIMIT_SECONDS)["JobState"] == "COMPLETED", logs(recipe)
    study = recipe.parent / "runs" / "sparsities"
    runs = read_study(study)
    assert [run.recipe.name for run in runs] == ["sparsities-2of4", "sparsities-6of8", "sparsities-8of8"]
    assert all(finished(run) for run in runs)
    before = {run.recipe.name: read_status(study / run.recipe.name) for run in runs}
    assert all(status is not None and status.state == "FINISHED" for status in before.values())
    again = submitted(sbn(cluster, recipe, *words))
    for task in range(3):
        assert cluster.await_end(f"{again}_{task}", LIMIT_SECONDS)["JobState"] == "COMPLETED"
        said = (study / "submissions" / "2" / f"slurm-{again}-{task}.out").read_text()
        assert f"finished already, {STEPS} steps" in said
    assert {name: read_status(study / name) for name in before} == before


def test_a_scaling_study_in_one_job_runs_all_sizes_on_the_same_nodes(cluster: Cluster, recipe: Path) -> None:
    sweep = recipe.parent / "scaling.yaml"
    sweep.write_text(
        f"name: scaling\nrecipe: tiny.yaml\n"
        f"set: {{training.steps: {STEPS}, parallel.tensor: 1, training.micro_batch_size: 1}}\n"
        "axes: {size: {two: {ranks: 2}, one: {ranks: 1}}}\n"
    )
    words = ["sweep", "submit", str(sweep), "--one-job", "--nproc-per-node", "1", "--time", "20:00"]
    job = submitted(sbn(cluster, recipe, *words))
    waiting = sbn(cluster, recipe, "submit", str(recipe), "run_dir=runs/scaling/scaling-two")
    assert f"job {job} of its study is still in the queue" in waiting.stderr
    fields = cluster.await_end(job, LIMIT_SECONDS)
    assert (fields["JobState"], fields["NumNodes"]) == ("COMPLETED", "2"), logs(recipe)
    study = recipe.parent / "runs" / "scaling"
    runs = {run.recipe.name: run for run in read_study(study)}
    assert sorted(runs) == ["scaling-one", "scaling-two"]
    assert all(finished(run) for run in runs.values())
    for name, ranks in (("scaling-one", 1), ("scaling-two", 2)):
        assert f"on {ranks} cpu rank" in (study / name / "logs" / "rank-0.log").read_text()
    said = (study / "submissions" / "1" / f"slurm-{job}.out").read_text()
    assert said.index("scaling-one: ends") < said.index("scaling-two: ends")


def test_a_run_is_shown_and_cancelled(cluster: Cluster, recipe: Path) -> None:
    words = ["submit", str(recipe), "run_dir=runs/long", "training.steps=100000", "parallel.tensor=1"]
    job = submitted(sbn(cluster, recipe, *words, "--", "--time", "10:00", "--comment=an option"))
    waiting = submitted(sbn(cluster, recipe, *words[:2], "run_dir=runs/held", "parallel.tensor=1", "--", "--hold"))
    deadline = time.monotonic() + LIMIT_SECONDS
    running = re.compile(r"^runs/long +RUNNING +[1-9][\d,]* / 100,000 .*", re.MULTILINE)
    while not (row := running.search(status(cluster, recipe))):
        assert time.monotonic() < deadline, logs(recipe)
        time.sleep(0.5)
    assert row[0].endswith(f"  {job} RUNNING")
    held = rf"^runs/held +WAITING .* {waiting} PENDING \(JobHeldUser\)$"
    assert re.search(held, status(cluster, recipe), re.MULTILINE)
    assert "step" in sbn(cluster, recipe, "logs", "runs/long").stdout
    cancelled = sbn(cluster, recipe, "cancel", "runs/long", "runs/held")
    assert cancelled.stdout.splitlines() == [
        f"runs/long: job {job} was told to end (SIGTERM): it saves a checkpoint and is not started again",
        f"runs/held: job {waiting} was PENDING (JobHeldUser) and is out of the queue",
    ]
    assert cluster.await_end(job, LIMIT_SECONDS)["JobState"] == "CANCELLED"
    assert re.search(r"^runs/long +STOPPED \(SIGTERM\)", status(cluster, recipe), re.MULTILINE)
    head = (recipe.parent / "runs" / "long" / "logs" / f"sbn-{job}-node-0.log").read_text().splitlines()
    assert [line.split()[0] for line in head[1:6]] == ["host", "CPUs", "memory", "GPUs", "driver"]


def status(cluster: Cluster, recipe: Path) -> str:
    return sbn(cluster, recipe, "status").stdout


def logs(recipe: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(recipe.parent.rglob("*.out")))
