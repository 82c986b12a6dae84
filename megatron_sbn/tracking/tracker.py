"""MLflow beside training and never in its way: a thread of rank 0 delivers what the run folder's files hold.

    metrics.jsonl, system_metrics.jsonl, tracking.json  ->  one daemon thread (mlflow_delivery.py)  ->  MLflow

While MLflow cannot be reached one warning is logged, attempts grow rarer, and nothing is lost: the files are complete
and `sync` delivers them later.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from megatron_sbn.errors import InputError, SbnError
from megatron_sbn.redaction import mask_secrets
from megatron_sbn.runs.folder import METRICS, TRACKING
from megatron_sbn.runs.tracking_record import DatasetRecord, RunRecord, RunRecordFile, masked, new_key, read_record
from megatron_sbn.tracking.mlflow_delivery import Delivery

FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 2.0, 300.0
CLOSING_ATTEMPTS = 3
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
    record = read_record(run_dir / TRACKING)
    if not (run_dir / METRICS).is_file():
        raise InputError(f"{run_dir / METRICS}: no such file; there is nothing to deliver")
    if uri is None and "***" in record.uri:
        raise InputError(f"{run_dir / TRACKING}: uri = {record.uri} lacks its password; give the tracking URI")
    uri = uri or record.uri
    file = RunRecordFile(run_dir / TRACKING, _at_destination(record, record.experiment, mask_secrets(uri)))
    delivery = Delivery(run_dir, file, uri)
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
        artifacts: text files, such as the resolved recipe. datasets: what the run reads.
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
        datasets: Sequence[DatasetRecord] = (),
        *,
        run_id: str | None = None,
        poll_seconds: float = 2.0,
    ) -> None:
        self._poll_seconds = poll_seconds
        self._closing = threading.Event()
        self._delivered = False
        self._warned = False
        self._file = RunRecordFile(run_dir / TRACKING, _record(run_dir, name, experiment, mask_secrets(uri), run_id))
        self._file.update(
            name=name,
            params=masked(params),
            tags=masked(tags),
            artifacts=[str(path.absolute()) for path in artifacts],
            status="RUNNING",
            ended=None,
            folder=str(run_dir.resolve()),
            datasets=tuple(datasets),
        )
        self._delivery = Delivery(run_dir, self._file, uri)
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
    path = run_dir / TRACKING
    try:
        known = read_record(path)
        if known.folder is not None and _is_copy(known, run_dir):
            _log.warning("%s is a copy of %s: it is a run of its own in MLflow", run_dir, known.folder)
            return RunRecord(new_key(), name, experiment, uri, time.time(), {}, {}, [])
        return _at_destination(known, experiment, uri)
    except InputError as error:
        if path.exists():
            _log.warning("%s; this run starts anew in MLflow", error)
        return RunRecord(new_key(), name, experiment, uri, time.time(), {}, {}, [], run_id=run_id)


def _is_copy(record: RunRecord, run_dir: Path) -> bool:
    """Whether the folder that the record was written in is another one, and has the same run still."""
    home = Path(str(record.folder))
    if home == run_dir.resolve():
        return False
    try:
        return read_record(home / TRACKING).key == record.key
    except InputError:
        return False  # it was moved


def _at_destination(record: RunRecord, experiment: str, uri: str) -> RunRecord:
    """The record, without the run id if that is of another place."""
    if (record.experiment, record.uri) == (experiment, uri):
        return record
    return replace(record, experiment=experiment, uri=uri, run_id=None, delivered_step=None, experiment_id=None)
