"""All that is said to MLflow, and its failures in one line. mlflow is imported by tracking/mlflow_*.py alone.

A metric line is sent when its step is above the last step that MLflow itself reports for that metric
(pending_points.py). So a repeated batch, a resumed job that writes steps anew, or a run folder that is delivered a
second time adds nothing: each (metric, step) is there once, as it was first delivered. Only MLflow is asked what it
has, when a connection is made and after every failure. Timestamps are the line's own, so even a batch whose answer was
lost is the same rows again. mlflow takes seconds to import, so that happens at the first call.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sbn.errors import DeliveryError
from megatron_sbn.redaction import mask_secrets
from megatron_sbn.runs.finished_run import Run
from megatron_sbn.runs.folder import METRICS, SYSTEM_METRICS
from megatron_sbn.runs.tracking_record import RunRecordFile, artifact_files
from megatron_sbn.tracking.mlflow_assets import log_datasets, log_models
from megatron_sbn.tracking.mlflow_settings import configure_mlflow
from megatron_sbn.tracking.pending_points import PendingPoints
from megatron_sbn.tracking.sqlite_file import artifact_location, database_file, ensure_tables, remove_stray_folder
from megatron_sbn.tracking.study import STUDY_TAG, Study, attach, delivered

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

KEY_TAG = "run_key"
# MLflow's limits on one request and on one value.
METRICS_PER_BATCH, ENTRIES_PER_BATCH = 1000, 100
# Longest values that servers take: of this release, of 2.8, of 2.0.
PARAM_LENGTHS, TAG_LENGTHS = (6000, 500, 250), (8000, 5000, 250)


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
        reason = short_reason(mask_secrets(str(error)))
        raise DeliveryError(f"MLflow at {mask_secrets(uri)} cannot be reached: {reason}") from None


def short_reason(text: str) -> str:
    """The beginning of an exception's text: to its first bracket or the end of a sentence, at most 120 characters."""
    line = " ".join(text.split())
    short = re.split(r" ?[(\[{]|(?<=\w)\. ", line, maxsplit=1)[0] or line
    return short if len(short) <= 120 else f"{short[:117]}..."


class Delivery:
    """All that is said to MLflow about one run. Every method may be repeated after any failure."""

    def __init__(self, run_dir: Path, file: RunRecordFile, uri: str) -> None:
        self._metrics = PendingPoints(run_dir / METRICS)
        self._system_metrics = PendingPoints(run_dir / SYSTEM_METRICS)
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
            database = database_file(self._uri)
            if database is not None:
                remove_stray_folder(database)
            log_models(self._client, self._experiment, self._run_id, self._file.path.parent)
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
        self._file.update(run_id=run.info.run_id, experiment_id=run.info.experiment_id)
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
        logged = run.data.params
        new = {key: value for key, value in record.params.items() if key not in logged}
        changed = {
            f"changed.{key}": value
            for key, value in record.params.items()
            if key in logged and not _is_same(logged[key], value)
        }
        self._send_entries("params", Param, new, PARAM_LENGTHS)
        self._send_entries("tags", RunTag, record.tags | changed, TAG_LENGTHS)
        log_datasets(self._client, run, record.datasets)
        if record.status == "RUNNING" != run.info.status:
            self._client.update_run(run.info.run_id, status="RUNNING")

    def _send_entries(
        self, kind: str, entity: Callable[[str, str], Any], values: Mapping[str, str], lengths: Sequence[int]
    ) -> None:
        """Parameters or tags. A server that refuses a value for its length gets a shorter one, at last the shortest."""
        from mlflow.exceptions import INVALID_PARAMETER_VALUE, ErrorCode, MlflowException

        for length, shorter in zip(lengths, (*lengths[1:], None), strict=True):
            entries = [entity(key, _truncated(value, length)) for key, value in values.items()]
            try:
                for start in range(0, len(entries), ENTRIES_PER_BATCH):
                    self._client.log_batch(self._run_id, **{kind: entries[start : start + ENTRIES_PER_BATCH]})
            except MlflowException as error:
                if shorter is None or error.error_code != ErrorCode.Name(INVALID_PARAMETER_VALUE):
                    raise
            else:
                return

    def _send_points(self, source: PendingPoints) -> int | None:
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


def _is_same(logged: str, value: str) -> bool:
    """Whether MLflow has the value, perhaps truncated."""
    return logged == value or any(logged == _truncated(value, length) for length in PARAM_LENGTHS)


def _truncated(value: str, length: int) -> str:
    return value if len(value) <= length else value[: length - 3] + "..."
