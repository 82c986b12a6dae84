"""MLflow: every metric once, across resumes, kills and outages; nothing of it in training's way."""

import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from time_limit import LIMIT_SECONDS

from megatron_sbn.errors import DeliveryError, InputError
from megatron_sbn.runs.metrics_file import MetricsFile, read_metrics
from megatron_sbn.runs.tracking_record import read_record
from megatron_sbn.tracking import mlflow_delivery
from megatron_sbn.tracking import tracker as following
from megatron_sbn.tracking.sqlite_file import database_uri
from megatron_sbn.tracking.tracker import Tracker, sync

PARAMS = {"optimizer.lr": "0.0003", "linear.sparsity": "6:8"}
TAGS = {"git_commit": "abc", "layout": "tensor 2"}


def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(uri)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run-1"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: run-1\ntracking:\n  uri: http://me:hush@host:5000\n")
    return folder


def start(run_dir, uri, **changes):
    arguments = {
        "name": "run-1",
        "experiment": "study",
        "uri": uri,
        "params": PARAMS,
        "tags": TAGS,
        "artifacts": [run_dir / "recipe.yaml"],
        "poll_seconds": 0.05,
    }
    return Tracker(run_dir, **(arguments | changes))


def only_run(uri, experiment="study"):
    (run,) = client(uri).search_runs([client(uri).get_experiment_by_name(experiment).experiment_id])
    return run


def history(uri, name):
    """(step, timestamp, value) as MLflow has them."""
    points = client(uri).get_metric_history(only_run(uri).info.run_id, name)
    return sorted((point.step, point.timestamp, point.value) for point in points)


def expected(run_dir, name):
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if name in line]
    return [(line["step"], int(line["time"] * 1000), line[name]) for line in lines]


def wait_for(condition):
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_arrives_whole(run_dir, uri, capfd):
    file = MetricsFile(run_dir / "metrics.jsonl")
    tracker = start(run_dir, uri, params=PARAMS | {f"p{i}": str(i) for i in range(250)} | {"long": "x" * 7000})
    for step in range(1, 701):
        file.append(step, {"loss": 1 / step, "lr": 0.1})
        if step % 100 == 0:
            file.append(step, {"validation_loss": 2 / step})
    assert tracker.close("FINISHED") is True
    run = only_run(uri)
    assert (run.info.run_id, run.info.run_name, run.info.status) == (tracker.run_id, "run-1", "FINISHED")
    for name in ("loss", "lr", "validation_loss"):
        assert history(uri, name) == expected(run_dir, name)
    assert len(history(uri, "loss")) == 700
    assert run.data.params["p249"] == "249"
    assert run.data.params["linear.sparsity"] == "6:8"
    assert len(run.data.params["long"]) == 6000
    assert run.data.tags["git_commit"] == "abc"
    assert read_record(run_dir / "tracking.json").delivered_step == 700
    artifact = client(uri).download_artifacts(run.info.run_id, "recipe.yaml", str(run_dir.parent))
    with open(artifact) as text:  # noqa: PTH123
        assert text.read() == "name: run-1\ntracking:\n  uri: http://***@host:5000\n"
    assert run.info.artifact_uri.startswith((run_dir.parent / "mlartifacts").as_uri())
    assert capfd.readouterr() == ("", "")


def test_metrics_arrive_while_training_runs(run_dir, uri):
    file = MetricsFile(run_dir / "metrics.jsonl")
    tracker = start(run_dir, uri)
    file.append(1, {"loss": 1.0})
    wait_for(lambda: read_record(run_dir / "tracking.json").delivered_step == 1)
    assert only_run(uri).info.status == "RUNNING"
    file.append(2, {"loss": 0.5})
    wait_for(lambda: read_record(run_dir / "tracking.json").delivered_step == 2)
    assert tracker.close("FAILED")
    assert [value for _, _, value in history(uri, "loss")] == [1.0, 0.5]
    assert only_run(uri).info.status == "FAILED"


def test_non_finite_values_arrive(run_dir, uri):
    MetricsFile(run_dir / "metrics.jsonl").append(3, {"loss": math.nan, "grad_norm": math.inf})
    assert start(run_dir, uri).close("FAILED")
    ((step, _, value),) = history(uri, "loss")
    assert step == 3
    assert math.isnan(value)
    assert history(uri, "grad_norm")[0][2] > 1e308  # SQL has no infinity: MLflow stores the largest number


def test_a_resumed_job_continues_the_run_and_repeats_nothing(run_dir, uri):
    path = run_dir / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 8):
        file.append(step, {"loss": float(step)})
        if step == 6:
            file.append(step, {"validation_loss": 6.0})
    first = start(run_dir, uri)
    assert first.close("KILLED")
    assert only_run(uri).info.status == "KILLED"
    delivered = history(uri, "loss")

    file.truncate_after(4)
    second = start(run_dir, uri, params=PARAMS | {"optimizer.lr": "0.1", "new": "1"}, tags=TAGS | {"git_commit": "def"})
    wait_for(lambda: only_run(uri).info.status == "RUNNING")
    for step in range(5, 10):
        file.append(step, {"loss": float(step)})
        if step % 3 == 0:
            file.append(step, {"validation_loss": float(step)})
    assert second.close("FINISHED")
    assert second.run_id == first.run_id
    run = only_run(uri)
    losses = history(uri, "loss")
    assert losses[:7] == delivered
    assert [(step, value) for step, _, value in losses] == [(step, float(step)) for step in range(1, 10)]
    assert [(step, value) for step, _, value in history(uri, "validation_loss")] == [(6, 6.0), (9, 9.0)]
    assert (run.data.params["optimizer.lr"], run.data.params["new"]) == ("0.0003", "1")
    assert run.data.tags["changed.optimizer.lr"] == "0.1"
    assert "changed.linear.sparsity" not in run.data.tags
    assert (run.data.tags["git_commit"], run.info.status) == ("def", "FINISHED")


def test_a_validation_line_of_a_delivered_step_still_arrives(run_dir, uri):
    """A job killed between the two lines of a step: the second is new though the step is not."""
    file = MetricsFile(run_dir / "metrics.jsonl")
    file.append(5, {"loss": 1.0})
    start(run_dir, uri).close("KILLED")
    file.append(5, {"validation_loss": 2.0})
    start(run_dir, uri).close("FINISHED")
    assert [(step, value) for step, _, value in history(uri, "validation_loss")] == [(5, 2.0)]
    assert len(history(uri, "loss")) == 1


@pytest.mark.parametrize("lost", ["delivered_step", "run_id"])
def test_a_kill_after_mlflow_has_it_and_before_the_record_does(run_dir, uri, lost):
    file = MetricsFile(run_dir / "metrics.jsonl")
    for step in (1, 2, 3):
        file.append(step, {"loss": float(step)})
    first = start(run_dir, uri)
    first.close("KILLED")
    before = history(uri, "loss")
    record = run_dir / "tracking.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {lost: None}))
    file.append(4, {"loss": 4.0})
    second = start(run_dir, uri)
    assert second.close("FINISHED")
    assert second.run_id == first.run_id
    assert history(uri, "loss")[:3] == before
    assert history(uri, "loss") == expected(run_dir, "loss")


def test_a_failed_batch_is_sent_again_once(run_dir, uri, monkeypatch, caplog):
    """The database takes the rows, the answer is lost: the retry adds nothing and leaves nothing out."""
    from mlflow import MlflowClient

    real, failures = MlflowClient.log_batch, []

    def lossy(self, run_id, metrics=(), params=(), tags=(), **kwargs):
        result = real(self, run_id, metrics, params, tags, **kwargs)
        if metrics and len(failures) < 2:
            failures.append(len(metrics))
            raise ConnectionResetError("answer lost")
        return result

    monkeypatch.setattr(MlflowClient, "log_batch", lossy)
    monkeypatch.setattr(mlflow_delivery, "METRICS_PER_BATCH", 7)
    monkeypatch.setattr(following, "FIRST_RETRY_SECONDS", 0.01)
    file = MetricsFile(run_dir / "metrics.jsonl")
    for step in range(30):
        file.append(step, {"loss": float(step), "lr": 1.0})
    tracker = start(run_dir, uri)
    wait_for(lambda: read_record(run_dir / "tracking.json").delivered_step == 29)
    assert tracker.close("FINISHED")
    assert failures == [7, 7]
    for name in ("loss", "lr"):
        assert history(uri, name) == expected(run_dir, name)
    assert len([record for record in caplog.records if record.name == "megatron_sbn"]) == 1


def test_a_server_that_lost_the_run_gets_all_of_it_again(run_dir, uri, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import RESOURCE_DOES_NOT_EXIST, MlflowException

    monkeypatch.setattr(following, "FIRST_RETRY_SECONDS", 0.01)
    file = MetricsFile(run_dir / "metrics.jsonl")
    for step in (1, 2, 3):
        file.append(step, {"loss": float(step)})
    tracker = start(run_dir, uri)
    wait_for(lambda: read_record(run_dir / "tracking.json").delivered_step == 3)
    old, real = tracker.run_id, MlflowClient.get_run

    def forgotten(self, run_id):
        if run_id == old:
            raise MlflowException("no such run", error_code=RESOURCE_DOES_NOT_EXIST)
        return real(self, run_id)

    def broken(self, *args, **kwargs):
        monkeypatch.undo()
        monkeypatch.setattr(MlflowClient, "get_run", forgotten)
        client(uri).delete_run(old)
        raise ConnectionResetError("the server is replaced")

    monkeypatch.setattr(MlflowClient, "log_batch", broken)
    file.append(4, {"loss": 4.0})
    wait_for(lambda: read_record(run_dir / "tracking.json").delivered_step == 4)
    assert tracker.close("FINISHED")
    assert tracker.run_id != old
    assert history(uri, "loss") == expected(run_dir, "loss")


def test_sync_adds_nothing_to_a_delivered_run(run_dir, uri):
    file = MetricsFile(run_dir / "metrics.jsonl")
    file.append(1, {"loss": 1.0})
    tracker = start(run_dir, uri)
    tracker.close("FINISHED")
    assert sync(run_dir) == sync(run_dir) == tracker.run_id
    assert history(uri, "loss") == expected(run_dir, "loss")
    assert only_run(uri).info.status == "FINISHED"


def test_sync_to_another_place_and_back(run_dir, uri, tmp_path, empty_database):
    MetricsFile(run_dir / "metrics.jsonl").append(1, {"loss": 1.0})
    tracker = start(run_dir, uri)
    tracker.close("FINISHED")
    (tmp_path / "other").mkdir()
    shutil.copy(empty_database, tmp_path / "other" / "mlflow.db")
    other = database_uri(tmp_path / "other" / "mlflow.db")
    assert sync(run_dir, other) != tracker.run_id
    assert only_run(other).data.params == only_run(uri).data.params == PARAMS
    assert history(other, "loss") == history(uri, "loss")
    assert sync(run_dir, uri) == tracker.run_id
    assert len(history(uri, "loss")) == 1


def test_a_run_deleted_by_a_person_is_not_written_to(run_dir, uri):
    MetricsFile(run_dir / "metrics.jsonl").append(1, {"loss": 1.0})
    tracker = start(run_dir, uri)
    tracker.close("FINISHED")
    client(uri).delete_run(tracker.run_id)
    with pytest.raises(DeliveryError, match="is deleted"):
        sync(run_dir)


def test_sync_refuses_bad_folders(tmp_path, run_dir):
    with pytest.raises(InputError, match=r"tracking\.json: no such file"):
        sync(tmp_path)
    for content in ("nonsense", "[]", "{}"):
        (run_dir / "tracking.json").write_text(content)
        with pytest.raises(InputError, match=r"tracking\.json: "):
            sync(run_dir)


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url):
    try:
        with urllib.request.urlopen(url + "/health", timeout=LIMIT_SECONDS) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_an_outage_warns_once_and_is_made_up_for(run_dir, uri, tmp_path, caplog, monkeypatch):
    """No server during the run; one on that port afterwards. Then a resumed job goes on there."""
    monkeypatch.setattr(following, "FIRST_RETRY_SECONDS", 0.01)
    port = closed_port()
    server_uri = f"http://user:hush-hush@127.0.0.1:{port}"
    file = MetricsFile(run_dir / "metrics.jsonl")
    with caplog.at_level(logging.INFO):
        tracker = start(run_dir, server_uri, tags=TAGS | {"command": f"train tracker.uri={server_uri}"})
        for step in range(1, 6):
            file.append(step, {"loss": math.nan if step == 5 else float(step)})
        wait_for(lambda: caplog.records)
        time.sleep(0.5)  # several more attempts
        assert len([record for record in caplog.records if record.name == "megatron_sbn"]) == 1
        assert tracker.close("FAILED", timeout=30.0) is False
    messages = [record.getMessage() for record in caplog.records if record.name == "megatron_sbn"]
    assert len(messages) == 2
    assert f"http://***@127.0.0.1:{port} cannot be reached" in messages[0]
    assert f"sbn sync {run_dir}" in messages[1]
    assert "hush" not in caplog.text
    assert "hush" not in (run_dir / "tracking.json").read_text()
    assert len(read_metrics(file.path)) == 5
    with pytest.raises(InputError, match="lacks its password"):
        sync(run_dir)
    with pytest.raises(DeliveryError) as refused:
        sync(run_dir, server_uri)
    assert "hush" not in str(refused.value)

    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port)]
    command += ["--artifacts-destination", str(tmp_path / "artifacts"), "--workers", "1"]
    with (tmp_path / "server.log").open("w") as log:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}"))
        run_id = sync(run_dir, server_uri)
        assert sync(run_dir, server_uri) == run_id
        assert [value for _, _, value in history(uri, "loss")][:4] == [1.0, 2.0, 3.0, 4.0]
        assert len(history(uri, "loss")) == 5
        run = only_run(uri)
        assert (run.info.run_id, run.info.status) == (run_id, "FAILED")
        assert run.data.tags["command"] == f"train tracker.uri=http://***@127.0.0.1:{port}"
        (recipe,) = (tmp_path / "artifacts").rglob("recipe.yaml")
        assert "hush" not in recipe.read_text()

        file.truncate_after(4)
        resumed = start(run_dir, server_uri)
        file.append(5, {"loss": 5.0})
        file.append(6, {"loss": 6.0})
        assert resumed.close("FINISHED")
        assert resumed.run_id == run_id
        assert [step for step, _, _ in history(uri, "loss")] == [1, 2, 3, 4, 5, 6]
    finally:
        server.terminate()
        server.wait(20)


def test_importing_tracking_does_not_import_mlflow():
    code = "import sys, megatron_sbn.tracking.tracker as t; assert not {'mlflow', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_rollback_and_a_lost_record_go_on_in_the_same_run(run_dir, uri):
    """Cut back and written anew, the file is read from its start; MLflow keeps what it received first."""
    file = MetricsFile(run_dir / "metrics.jsonl")
    tracker = start(run_dir, uri)
    for step in range(1, 9):
        file.append(step, {"loss": float(step)})
    wait_for(lambda: read_record(run_dir / "tracking.json").delivered_step == 8)
    file.truncate_after(3)
    tracker.rewind("loss is nan; back to step 3")
    for step in range(4, 11):
        file.append(step, {"loss": 100.0 + step})
    assert tracker.close("FAILED") is True
    first = tracker.run_id
    values = [value for _, _, value in history(uri, "loss")]
    assert values == [*map(float, range(1, 9)), 109.0, 110.0]
    assert only_run(uri).data.tags["rollback"] == "loss is nan; back to step 3"
    (run_dir / "tracking.json").unlink()
    again = start(run_dir, uri, run_id=first)
    file.append(11, {"loss": 111.0})
    assert again.close("FINISHED") is True
    assert again.run_id == first
    assert [step for step, _, _ in history(uri, "loss")] == list(range(1, 12))
