"""What is said to MLflow where it or the run folder is not as usual: older servers, copied folders, long messages."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from megatron_sbn.data.index_header import shard_digest
from megatron_sbn.runs.metrics_file import MetricsFile
from megatron_sbn.runs.tracking_record import DatasetRecord, read_record
from megatron_sbn.tracking.mlflow_delivery import short_reason
from megatron_sbn.tracking.tracker import Tracker, sync


def tracked(run: Path, uri: str, params: dict[str, str], tags: dict[str, str], perplexity: float = 9.0) -> Tracker:
    run.mkdir(exist_ok=True)
    file = MetricsFile(run / "metrics.jsonl")
    file.append(1, {"loss": 2.0, "validation_perplexity": perplexity})
    file.close()
    tracker = Tracker(run, run.name, "e", uri, params, tags, [], poll_seconds=0.05)
    assert tracker.close("FINISHED")
    return tracker


def runs_of(uri: str) -> dict[str, object]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


@pytest.mark.parametrize("limit", [500, 250])
def test_an_older_server_gets_shorter_values(
    limit: int, tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow 2.8 takes 500 characters of a parameter, 2.0 250; the rest of the run arrives whole."""
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - binds the checks
    from mlflow.utils import validation

    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    monkeypatch.setattr(validation, "MAX_PARAM_VAL_LENGTH", limit)
    long = "x" * 3000
    for _ in range(2):  # a second start finds the shortened value, which is no change
        tracked(tmp_path / "run", uri, {"data.train": long, "lr": "0.1"}, {})
    run = runs_of(uri)["run"]
    assert len(run.data.params["data.train"]) == limit
    assert run.data.params["lr"] == "0.1"
    assert not [tag for tag in run.data.tags if tag.startswith("changed.")]
    assert run.data.metrics["loss"] == 2.0


def test_a_copied_run_folder_is_a_run_of_its_own(tmp_path: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    first = tracked(tmp_path / "first", uri, {}, {})
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    with caplog.at_level(logging.WARNING, "megatron_sbn"):
        second = tracked(tmp_path / "second", uri, {}, {})
    assert second.run_id != first.run_id
    assert set(runs_of(uri)) == {"first", "second"}
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'second'} is a copy of {tmp_path / 'first'}: it is a run of its own in MLflow"
    ]
    (tmp_path / "second").rename(tmp_path / "third")
    moved = tracked(tmp_path / "third", uri, {}, {})
    assert moved.run_id == second.run_id  # a folder that was moved is the same run


def test_a_record_of_the_first_version_is_read(tmp_path: Path, uri: str) -> None:
    run = tmp_path / "run"
    first = tracked(run, uri, {}, {})
    text = (run / "tracking.json").read_text()
    lines = [line for line in text.splitlines() if '"folder"' not in line and '"experiment_id"' not in line]
    old = "\n".join(lines).replace(",\n}", "\n}")
    (run / "tracking.json").write_text(old)
    assert read_record(run / "tracking.json").folder is None
    assert sync(run) == first.run_id
    assert read_record(run / "tracking.json").experiment_id is not None


def test_the_studys_row_has_the_best_perplexity(tmp_path: Path, uri: str) -> None:
    for name, perplexity in (("a", 12.0), ("b", 8.0), ("c", 10.0)):
        tracked(tmp_path / name, uri, {}, {"study": "s", "run_kind": "run"}, perplexity)
    parent = runs_of(uri)["s"]
    assert parent.data.metrics["best_validation_perplexity"] == 8.0
    assert parent.data.tags["best_run"] == "b"


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("API request failed (HTTPConnection(host='h'): Max retries", "API request failed"),
        ("Invalid name. See the page for more", "Invalid name"),
        ("(sqlite3.OperationalError) disk I/O error", "(sqlite3.OperationalError) disk I/O error"),
        ("x" * 500, "x" * 117 + "..."),
    ],
)
def test_a_reason_is_short_and_whole(text: str, short: str) -> None:
    assert short_reason(text) == short


def test_datasets_are_inputs_and_checkpoints_models_each_once(tmp_path: Path, uri: str) -> None:
    run = tmp_path / "run"
    for name in ("a", "b"):
        (tmp_path / f"{name}.bin").write_bytes(name.encode() * 3_000_000)
    digests = {shard_digest(str(tmp_path / name)) for name in ("a", "b")}
    assert len(digests) == 2
    datasets = [
        DatasetRecord("a", shard_digest(str(tmp_path / "a")), "/data/a", "training"),
        DatasetRecord("b", shard_digest(str(tmp_path / "b")), '/data/"b"', "validation"),
    ]
    for step in (1, 2):
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (run / "checkpoints" / ".step-00000003.partial").mkdir()
    file = MetricsFile(run / "metrics.jsonl")
    file.append(2, {"loss": 2.0, "validation_perplexity": 9.0})
    file.close()
    for _ in range(2):
        tracker = Tracker(run, "run", "e", uri, {}, {}, [], datasets, poll_seconds=0.05)
        assert tracker.close("FINISHED")
    sync(run)
    found = runs_of(uri)["run"]
    inputs = {one.dataset.name: one for one in found.inputs.dataset_inputs}
    assert len(found.inputs.dataset_inputs) == 2
    assert inputs["b"].tags[0].value == "validation"
    assert json.loads(inputs["b"].dataset.source) == {"uri": '/data/"b"'}
    models = MlflowClient(uri).search_logged_models([found.info.experiment_id])
    assert sorted(one.name for one in models) == ["step-00000001", "step-00000002"]
    last = next(one for one in models if one.name == "step-00000002")
    assert (last.source_run_id, last.tags["validation_perplexity"], str(last.status)) == (
        found.info.run_id,
        "9.0",
        "READY",
    )
    assert last.tags["path"] == str(run / "checkpoints" / "step-00000002")
