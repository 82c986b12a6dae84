"""Runs of a study are children of one parent run, whoever starts first, and the parent says how the study stands."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from time_limit import LIMIT_SECONDS

from megatron_sbn.cli import main
from megatron_sbn.config import load_recipe
from megatron_sbn.config.sweep import load_sweep
from megatron_sbn.runs.metrics_file import MetricsFile
from megatron_sbn.tracking.mlflow_delivery import delivered_study
from megatron_sbn.tracking.sqlite_file import database_uri
from megatron_sbn.tracking.study import KIND_TAG, PARENT_TAG, STUDY_TAG, Study, standing
from megatron_sbn.tracking.tags import describe_recipe
from megatron_sbn.tracking.tracker import Tracker, sync

RECIPES = Path(__file__).parents[2] / "recipes"


def track(folder: Path, uri: str) -> Tracker:
    folder.mkdir(exist_ok=True)
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.truncate_after(0)
    metrics.append(1, {"loss": 2.0})
    metrics.close()
    tags = {STUDY_TAG: "n-of-8", KIND_TAG: "run"}
    return Tracker(folder, folder.name, "experiment", uri, {}, tags, [], poll_seconds=0.01)


def rows(uri: str, kind: str) -> list:  # type: ignore[type-arg]
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("experiment")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"tags.{KIND_TAG} = '{kind}'")
    return sorted(found, key=lambda run: run.info.run_name)


def test_runs_have_one_parent_and_it_follows_them(tmp_path: Path, uri: str) -> None:
    first, second = track(tmp_path / "a", uri), track(tmp_path / "b", uri)
    assert first.close("FINISHED")
    assert second.close("FAILED")
    (parent,) = rows(uri, "study")
    children = rows(uri, "run")
    assert parent.info.run_name == "n-of-8"
    assert [child.info.run_name for child in children] == ["a", "b"]
    assert {child.data.tags[PARENT_TAG] for child in children} == {parent.info.run_id}
    assert parent.info.status == "FAILED"
    # The failed one is continued, and ends well: so does the study.
    assert track(tmp_path / "b", uri).close("FINISHED")
    (parent,) = rows(uri, "study")
    assert parent.info.status == "FINISHED"
    assert parent.info.end_time is not None
    assert len(rows(uri, "run")) == 2


def test_delivering_again_adds_no_parent(tmp_path: Path, uri: str) -> None:
    assert track(tmp_path / "a", uri).close("FINISHED")
    sync(tmp_path / "a")
    assert len(rows(uri, "study")) == 1
    assert len(rows(uri, "run")) == 1


def test_two_parents_become_one(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(uri)
    experiment = client.create_experiment("experiment")
    theirs = client.create_run(experiment, 1000, {STUDY_TAG: "n-of-8", KIND_TAG: "study"}, "n-of-8")
    run = client.create_run(experiment, 2000, {STUDY_TAG: "n-of-8", KIND_TAG: "run"}, "a")
    ours = Study(client, experiment, "n-of-8")
    # What our first search sees: the other job's parent is not there yet.
    search, first = ours._parents, [[]]
    monkeypatch.setattr(ours, "_parents", lambda: first.pop() if first else search())
    ours.adopt(run.info.run_id, 2000)
    assert [parent.info.run_id for parent in rows(uri, "study")] == [theirs.info.run_id]
    assert client.get_run(run.info.run_id).data.tags[PARENT_TAG] == theirs.info.run_id


def test_a_later_run_of_an_older_clock_moves_all_to_its_parent(uri: str) -> None:
    client = MlflowClient(uri)
    experiment = client.create_experiment("experiment")
    ours = Study(client, experiment, "n-of-8")
    run = client.create_run(experiment, 2000, {STUDY_TAG: "n-of-8", KIND_TAG: "run"}, "a")
    ours.adopt(run.info.run_id, 2000)
    older = client.create_run(experiment, 1000, {STUDY_TAG: "n-of-8", KIND_TAG: "study"}, "n-of-8")
    ours.adopt(run.info.run_id, 2000)  # as it does when the run ends
    assert client.get_run(run.info.run_id).data.tags[PARENT_TAG] == older.info.run_id
    assert [parent.info.run_id for parent in rows(uri, "study")] == [older.info.run_id]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["FINISHED", "RUNNING", "FAILED"], "RUNNING"),
        (["SCHEDULED", "FINISHED"], "RUNNING"),
        (["FINISHED", "KILLED", "FAILED"], "FAILED"),
        (["KILLED", "FINISHED"], "KILLED"),
        (["FINISHED"], "FINISHED"),
    ],
)
def test_standing(statuses: list[str], expected: str) -> None:
    assert standing(statuses) == expected


def test_sweeps_are_studies_and_tags_say_what_to_filter_by() -> None:
    variants = load_sweep(RECIPES / "sweeps" / "n-of-8-tiny.yaml").variants
    assert {variant.recipe.tracking.study for variant in variants} == {"n-of-8-tiny"}
    tags = describe_recipe(variants[2].recipe, 1)
    assert tags["study"] == "n-of-8-tiny"
    assert (tags["weight_format"], tags["sparsity"], tags["seed"]) == ("ternary", "7:8", "1234")
    assert tags["tokens"] == str(120 * 16 * 128)
    assert "study" not in describe_recipe(load_recipe(RECIPES / "quickstart.yaml"), 2)


@pytest.fixture
def study(tmp_path: Path, uri: str) -> Path:
    """Two run folders of the study n-of-8, which MLflow has."""
    study = tmp_path / "n-of-8"
    for n, perplexity in ((8, 100.0), (6, 104.5)):
        folder = study / f"ternary-{n}"
        folder.mkdir(parents=True)
        changes = (f"linear.sparsity={n}:8", "training.steps=2", "optimizer.lr_decay_steps=30")
        recipe = load_recipe(RECIPES / "tiny" / "base.yaml", (*changes, "tracking.study=n-of-8"))
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        metrics = MetricsFile(folder / "metrics.jsonl")
        for step in (1, 2):
            metrics.append(step, {"loss": 8.0 - step, "tokens_per_second": 100.0 * step})
        metrics.append(2, {"validation_perplexity": perplexity})
        metrics.close()
        # A sample of the machine, of which there are more than steps, is no step of the run.
        MetricsFile(folder / "system_metrics.jsonl").append(7, {"system/cpu_utilization_percentage": 50.0})
        tags = describe_recipe(recipe, 1)
        tracker = Tracker(folder, folder.name, "experiment", uri, recipe.flat(), tags, [folder / "recipe.yaml"])
        assert tracker.close("FINISHED")
    return study


def test_the_report_from_mlflow_is_that_from_the_folders(
    tmp_path: Path, study: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(study), "--output", str(tmp_path / "folders")]) == 0
    assert main(["report", "n-of-8", "--uri", uri, "--output", str(tmp_path / "mlflow")]) == 0
    for name in ("index.md", "runs.csv"):
        assert (tmp_path / "mlflow" / name).read_text() == (tmp_path / "folders" / name).read_text()
    assert "| 6:8 | 104.50 | 1.045 |" in (tmp_path / "mlflow" / "index.md").read_text()
    capsys.readouterr()
    assert main(["report", "n-of-9", "--uri", uri]) == 2
    assert "MLflow has no study 'n-of-9'" in capsys.readouterr().err


def attached(uri: str, folder: Path) -> dict[str, bytes]:
    """The parent's artifacts by path."""
    (parent,) = rows(uri, "study")
    client = MlflowClient(uri)
    assert [entry.path for entry in client.list_artifacts(parent.info.run_id)] == ["report"]
    found = [entry.path for entry in client.list_artifacts(parent.info.run_id, "report")]
    folder.mkdir()
    return {path: Path(client.download_artifacts(parent.info.run_id, path, str(folder))).read_bytes() for path in found}


def test_a_report_is_attached_to_the_studys_run(
    tmp_path: Path, study: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / "report").mkdir()
    (study / "report" / "notes.txt").write_text("not of the report")
    names = ("index.md", "loss.png", "perplexity.png", "runs.csv")
    assert main(["report", str(study), "--attach"]) == 0
    (parent,) = rows(uri, "study")
    assert f"attached to MLflow run {parent.info.run_id} of study n-of-8" in capsys.readouterr().out
    assert attached(uri, tmp_path / "a") == {f"report/{name}": (study / "report" / name).read_bytes() for name in names}
    # From MLflow, when another run has joined: the new page is in the place of the old one.
    assert track(tmp_path / "c", uri).close("FINISHED")
    assert [run.name for run in delivered_study(uri, "n-of-8")] == ["ternary-6", "ternary-8"]  # its recipe is to come
    (tmp_path / "c" / "recipe.yaml").write_text((study / "ternary-8" / "recipe.yaml").read_text())
    third = next(row for row in rows(uri, "run") if row.info.run_name == "c")
    MlflowClient(uri).log_artifact(third.info.run_id, str(tmp_path / "c" / "recipe.yaml"))
    output = tmp_path / "page"
    assert main(["report", "n-of-8", "--uri", uri, "--output", str(output), "--attach"]) == 0
    assert b"3 runs, 2 finished" in (output / "index.md").read_bytes()
    assert attached(uri, tmp_path / "b") == {f"report/{name}": (output / name).read_bytes() for name in names}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tags": {}}, "no run of it is tracked under a study (tracking.study)"),
        ({"uri": "http://***@host:5000"}, "its tracking URI http://***@host:5000 lacks its password; give the study's"),
        ({"tags": {STUDY_TAG: "other"}}, "its runs are of several studies (n-of-8 at sqlite:///"),
        ({"tags": {STUDY_TAG: "absent"}}, "MLflow has no study 'absent'"),
    ],
)
def test_a_report_that_cannot_be_attached(
    study: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, folder in enumerate(sorted(study.iterdir())):
        path = folder / "tracking.json"
        if index == 0 or "several" not in message:
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert main(["report", str(study), "--attach"]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert (study / "report" / "index.md").is_file()


def test_jobs_that_start_at_once_make_one_database(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    uri = database_uri(tmp_path / "mlflow.db")
    code = (
        "import sys; from pathlib import Path; from test_study import track\n"
        "assert track(Path(sys.argv[1]), sys.argv[2]).close('FINISHED', timeout=600)"
    )
    command = [sys.executable, "-c", code]
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    jobs = [
        subprocess.Popen([*command, str(folder), uri], env=environment, stderr=subprocess.PIPE, text=True)
        for folder in folders
    ]
    errors = [job.communicate(timeout=LIMIT_SECONDS)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], errors
    assert not any("cannot be reached" in text for text in errors), errors
    assert len(rows(uri, "study")) == 1
    assert [child.info.run_name for child in rows(uri, "run")] == ["a", "b", "c"]
