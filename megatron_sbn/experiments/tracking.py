"""MLflow: runs to compare in its UI, delivered beside training and never in its way. The only importer of mlflow.

    metrics.jsonl, system_metrics.jsonl, tracking.json  ->  one daemon thread  ->  MLflow

The training loop writes the run folder's files; a thread of rank 0 follows them. A metric line is sent when its step
is above the last step that MLflow itself reports for that metric (undelivered.py). So a repeated batch, a resumed job
that writes steps anew, or a run folder that is delivered a second time adds nothing: each (metric, step) is there
once, as it was first delivered. Only MLflow is asked what it has, when a connection is made and after every failure.
Timestamps are the line's own, so even a batch whose answer was lost is the same rows again.

While MLflow cannot be reached one warning is logged, attempts grow rarer, and nothing is lost: the files are complete
and `sync` delivers them later. mlflow takes seconds to import, so that happens in the thread.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_sbn.errors import DeliveryError, InputError, SbnError
from megatron_sbn.experiments.compare import Run
from megatron_sbn.experiments.mlflow_settings import configure_mlflow
from megatron_sbn.experiments.provenance import describe_environment, describe_recipe
from megatron_sbn.experiments.run_record import (
    FILE_NAME,
    RunRecord,
    RunRecordFile,
    artifact_files,
    masked,
    new_key,
    read_record,
)
from megatron_sbn.experiments.sqlite_file import artifact_location, database_file, default_uri, ensure_tables
from megatron_sbn.experiments.study import STUDY_TAG, Study, attach, delivered
from megatron_sbn.experiments.system_metrics import FILE_NAME as SYSTEM_METRICS_NAME
from megatron_sbn.experiments.undelivered import Undelivered
from megatron_sbn.masking import mask_secrets

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

__all__ = [
    "Tracker",
    "attach_report",
    "default_uri",
    "delivered_study",
    "describe_environment",
    "describe_recipe",
    "sync",
]

METRICS_NAME = "metrics.jsonl"
KEY_TAG = "run_key"
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 2.0, 300.0
CLOSING_ATTEMPTS = 3
# MLflow's limits on one request and on one value.
METRICS_PER_BATCH, ENTRIES_PER_BATCH, PARAM_LENGTH, TAG_LENGTH = 1000, 100, 6000, 8000
_log = logging.getLogger("megatron_sbn")


def sync(run_dir: Path, uri: str | None = None) -> str:
    """Delivers what MLflow lacks of a run folder, and the status of a run that ended; returns MLflow's run id.

    Args:
        run_dir: has tracking.json and metrics.jsonl.
        uri: where to; None means where the run was to be tracked.

    Raises:
        InputError: no such files, or not as they should be; or `uri` is needed because it holds a password.
        DeliveryError: MLflow cannot be reached.
    """
    record = read_record(run_dir / FILE_NAME)
    if not (run_dir / METRICS_NAME).is_file():
        raise InputError(f"{run_dir / METRICS_NAME}: no such file; there is nothing to deliver")
    if uri is None and "***" in record.uri:
        raise InputError(f"{run_dir / FILE_NAME}: uri = {record.uri} lacks its password; give the tracking URI")
    uri = uri or record.uri
    file = RunRecordFile(run_dir / FILE_NAME, _at_destination(record, record.experiment, mask_secrets(uri)))
    delivery = _Delivery(run_dir, file, uri)
    delivery.push()
    if file.record.status != "RUNNING":
        delivery.finish()
    assert file.record.run_id is not None
    return file.record.run_id


class Tracker:
    """Follows a run folder's metrics.jsonl and keeps MLflow up to date with it. Made on rank 0 only.

    Args:
        run_dir: the run folder. If it has a tracking.json, that MLflow run is continued.
        name, experiment: as they are to appear in MLflow.
        uri: MLflow tracking URI (sqlite:///..., http://...). Credentials in it stay in memory.
        params: logged once; MLflow keeps the first value, a later one becomes the tag `changed.NAME`.
        tags: set at every start.
        artifacts: text files, such as the resolved recipe.
        run_id: MLflow's id of this run as its checkpoint knows it, for a run folder without a tracking.json.
        poll_seconds: how often new lines are looked for.
    """

    def __init__(
        self,
        run_dir: Path,
        name: str,
        experiment: str,
        uri: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        artifacts: Sequence[Path],
        *,
        run_id: str | None = None,
        poll_seconds: float = 2.0,
    ) -> None:
        self._poll_seconds = poll_seconds
        self._closing = threading.Event()
        self._delivered = False
        self._warned = False
        self._file = RunRecordFile(run_dir / FILE_NAME, _record(run_dir, name, experiment, mask_secrets(uri), run_id))
        self._file.update(
            name=name,
            params=masked(params),
            tags=masked(tags),
            artifacts=[str(path.absolute()) for path in artifacts],
            status="RUNNING",
            ended=None,
        )
        self._delivery = _Delivery(run_dir, self._file, uri)
        self._thread = threading.Thread(target=self._follow, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run; None until MLflow has been reached."""
        return self._file.record.run_id

    def rewind(self, why: str) -> None:
        """metrics.jsonl was cut back to an earlier step. MLflow keeps what it has, and the reason as a tag."""
        self._file.update(tags=self._file.record.tags | {"rollback": why})
        self._delivery.rewound = True

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"], timeout: float = 30.0) -> bool:
        """Delivers the rest with the run's status, for at most `timeout` seconds. Returns whether MLflow has it all.

        If not, a warning says how to deliver it later.
        """
        self._file.update(status=status, ended=time.time())
        self._closing.set()
        self._thread.join(timeout)
        if not self._delivered:
            folder = self._file.path.parent
            _log.warning("MLflow lacks some of this run; %s has all of it: run `sbn sync %s` later", folder, folder)
        return self._delivered

    def _follow(self) -> None:
        """The thread: delivers until closed, then a last time."""
        delay = FIRST_RETRY_SECONDS
        while not self._closing.is_set():
            if self._attempt():
                delay = FIRST_RETRY_SECONDS
                self._closing.wait(self._poll_seconds)
            else:
                self._closing.wait(delay)
                delay = min(2 * delay, LAST_RETRY_SECONDS)
        for attempt in range(CLOSING_ATTEMPTS):
            time.sleep(min(attempt, 1))
            if self._attempt(last=True):
                self._delivered = True
                return

    def _attempt(self, last: bool = False) -> bool:
        try:
            self._delivery.push()
            if last:
                self._delivery.finish()
        except SbnError as error:
            if not self._warned:
                self._warned = True
                _log.warning("%s; training goes on, and metrics.jsonl is complete", error)
            return False
        return True


def _record(run_dir: Path, name: str, experiment: str, uri: str, run_id: str | None) -> RunRecord:
    """The run folder's record, if it has one, for this destination; else a new one, of the run of that id."""
    path = run_dir / FILE_NAME
    try:
        return _at_destination(read_record(path), experiment, uri)
    except InputError as error:
        if path.exists():
            _log.warning("%s; this run starts anew in MLflow", error)
        return RunRecord(new_key(), name, experiment, uri, time.time(), {}, {}, [], run_id=run_id)


def _at_destination(record: RunRecord, experiment: str, uri: str) -> RunRecord:
    """The record, without the run id if that is of another place."""
    if (record.experiment, record.uri) == (experiment, uri):
        return record
    return replace(record, experiment=experiment, uri=uri, run_id=None, delivered_step=None)


def delivered_study(uri: str, name: str) -> list[Run]:
    """The runs of a study that MLflow has. Raises InputError for an unknown study, DeliveryError for no MLflow."""
    with _conversation(uri):
        from mlflow import MlflowClient

        return delivered(MlflowClient(uri), name)


def attach_report(uri: str, name: str, files: Sequence[Path]) -> list[str]:
    """Makes files artifacts of a study's parent run; returns its id (several: one an experiment).

    Raises InputError for an unknown study, DeliveryError for no MLflow.
    """
    with _conversation(uri):
        from mlflow import MlflowClient

        return attach(MlflowClient(uri), name, files)


@contextmanager
def _conversation(uri: str) -> Iterator[None]:
    """mlflow's failures as one line without secrets."""
    configure_mlflow()
    try:
        from alembic.util import CommandError
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError as error:
        raise DeliveryError(f"mlflow cannot be imported ({error}); install it, or set tracking.enabled=false") from None
    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError, CommandError, OSError, ImportError) as error:
        reason = " ".join(mask_secrets(str(error)).split())[:300]
        raise DeliveryError(f"MLflow at {mask_secrets(uri)} cannot be reached: {reason}") from None


class _Delivery:
    """All that is said to MLflow about one run. Every method may be repeated after any failure."""

    def __init__(self, run_dir: Path, file: RunRecordFile, uri: str) -> None:
        self._metrics = Undelivered(run_dir / METRICS_NAME)
        self._system_metrics = Undelivered(run_dir / SYSTEM_METRICS_NAME)
        self._file = file
        self._uri = uri
        self.rewound = False  # whether the file has to be read from its start again
        self._connected = False
        self._artifacts_done = False

    def push(self) -> None:
        """Delivers what is new. Raises DeliveryError, or InputError for a broken metrics.jsonl."""
        if self.rewound:
            self.rewound = self._connected = False
        with self._conversation():
            if not self._connected:
                self._connect()
            step = self._send_points(self._metrics)
            if step is not None:
                self._file.update(delivered_step=max(step, self._file.record.delivered_step or 0))
            if not self._artifacts_done:
                self._send_artifacts()
            self._send_points(self._system_metrics)

    def finish(self) -> None:
        """Gives the MLflow run the record's status and end. Raises DeliveryError."""
        record = self._file.record
        with self._conversation():
            ended = _milliseconds(record.ended or time.time())
            self._client.set_terminated(self._run_id, record.status, ended)
            self._join_study()

    @contextmanager
    def _conversation(self) -> Iterator[None]:
        """After any failure the next attempt connects anew."""
        try:
            with _conversation(self._uri):
                yield
        except DeliveryError:
            self._connected = False
            raise

    @property
    def _run_id(self) -> str:
        run_id = self._file.record.run_id
        assert run_id is not None
        return run_id

    def _connect(self) -> None:
        """Finds or makes the run, describes it, and asks which steps it has."""
        from mlflow import MlflowClient

        database = database_file(self._uri)
        if database is not None:
            ensure_tables(database, lambda uri: MlflowClient(uri).search_experiments(max_results=1))
        self._client = MlflowClient(self._uri)
        run = self._known_run() or self._run_by_key(self._experiment_id())
        self._file.update(run_id=run.info.run_id)
        self._describe(run)
        self._experiment = run.info.experiment_id
        self._study: Study | None = None
        self._join_study()
        last_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self._metrics.begin_after(last_steps)
        self._system_metrics.begin_after(last_steps)
        self._connected = True

    def _join_study(self) -> None:
        """Puts the run under its study's parent, if it is of one."""
        record = self._file.record
        if STUDY_TAG not in record.tags:
            return
        if self._study is None:
            self._study = Study(self._client, self._experiment, record.tags[STUDY_TAG])
        self._study.adopt(self._run_id, _milliseconds(record.started))

    def _known_run(self) -> "MlflowRun | None":
        from mlflow.exceptions import RESOURCE_DOES_NOT_EXIST, ErrorCode, MlflowException

        if self._file.record.run_id is None:
            return None
        try:
            run = self._client.get_run(self._run_id)
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                return None
            raise
        if run.info.lifecycle_stage == "deleted":
            raise DeliveryError(f"MLflow run {self._run_id} is deleted; `mlflow runs restore --run-id` brings it back")
        return run

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._file.record.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                created: str = self._client.create_experiment(name, artifact_location(self._uri))
                return created
            except MlflowException:
                experiment = self._client.get_experiment_by_name(name)  # another job was faster
                if experiment is None:
                    raise
        if experiment.lifecycle_stage == "deleted":
            raise DeliveryError(f"MLflow experiment {name!r} is deleted; restore it or set tracking.experiment")
        experiment_id: str = experiment.experiment_id
        return experiment_id

    def _run_by_key(self, experiment_id: str) -> "MlflowRun":
        record = self._file.record
        found = self._client.search_runs([experiment_id], f"tags.{KEY_TAG} = '{record.key}'", max_results=1)
        if found:
            return found[0]
        started = _milliseconds(record.started)
        return self._client.create_run(experiment_id, started, {KEY_TAG: record.key}, record.name)

    def _describe(self, run: "MlflowRun") -> None:
        """Parameters that MLflow lacks, all tags, and RUNNING for a run that is continued."""
        from mlflow.entities import Param, RunTag

        record = self._file.record
        wanted = {key: _cut(value, PARAM_LENGTH) for key, value in record.params.items()}
        logged = run.data.params
        params = [Param(key, value) for key, value in wanted.items() if key not in logged]
        changed = {f"changed.{key}": value for key, value in wanted.items() if logged.get(key, value) != value}
        tags = [RunTag(key, _cut(value, TAG_LENGTH)) for key, value in (record.tags | changed).items()]
        for start in range(0, len(params), ENTRIES_PER_BATCH):
            self._client.log_batch(run.info.run_id, params=params[start : start + ENTRIES_PER_BATCH])
        for start in range(0, len(tags), ENTRIES_PER_BATCH):
            self._client.log_batch(run.info.run_id, tags=tags[start : start + ENTRIES_PER_BATCH])
        if record.status == "RUNNING" != run.info.status:
            self._client.update_run(run.info.run_id, status="RUNNING")

    def _send_points(self, source: Undelivered) -> int | None:
        """Sends what is missing; returns its last step, None for nothing."""
        from mlflow.entities import Metric

        points = source.take()
        for start in range(0, len(points), METRICS_PER_BATCH):
            batch = [Metric(*point) for point in points[start : start + METRICS_PER_BATCH]]
            self._client.log_batch(self._run_id, metrics=batch)
        return max((point.step for point in points), default=None)

    def _send_artifacts(self) -> None:
        for artifact in artifact_files(self._file.record, self._file.path.parent):
            text = artifact.read_text(encoding="utf-8", errors="replace")
            self._client.log_text(self._run_id, mask_secrets(text), artifact.name)
        self._artifacts_done = True


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _cut(value: str, length: int) -> str:
    return value if len(value) <= length else value[: length - 3] + "..."
