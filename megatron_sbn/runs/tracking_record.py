"""tracking.json: what a run tells MLflow besides metrics, and which MLflow run it is.

It holds all that is needed to deliver the run later and from elsewhere: name, experiment, parameters, tags, artifacts
and status. What MLflow already has is not remembered here but asked of MLflow, so the two cannot disagree;
`delivered_step` is for people. `key` is written before the MLflow run is made and is a tag of it: a run whose id never
came back (a lost answer, a kill) is found by its key instead of made twice. No secrets: URIs are masked.
"""

import json
import threading
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from megatron_sbn.atomic_files import write_atomically
from megatron_sbn.errors import InputError
from megatron_sbn.redaction import excerpt, mask_secrets

Time = Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)]


@dataclass(frozen=True)
class DatasetRecord:
    """A dataset that a run reads: its name, a digest of its content, its path; context: training or validation."""

    name: str
    digest: str
    path: str
    context: str


@dataclass(frozen=True)
class RunRecord:
    """The content of tracking.json.

    Attributes:
        key: unique name of this run folder's run.
        name, experiment, uri: as MLflow shows them; `uri` masked.
        started, ended: seconds since 1970; `ended` is None while the job runs.
        params, tags: masked values.
        artifacts: text files, by path.
        status: RUNNING, FINISHED, FAILED or KILLED.
        run_id: MLflow's, of the run at `uri`; None until it is known.
        delivered_step: last step that MLflow confirmed.
        experiment_id: MLflow's, of the run at `uri`.
        datasets: what it reads.
        folder: the run folder that this was written in, resolved: a copy of it is another run.
    """

    key: str
    name: str
    experiment: str
    uri: str
    started: Time
    params: dict[str, str]
    tags: dict[str, str]
    artifacts: list[str]
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] = "RUNNING"
    ended: Time | None = None
    run_id: str | None = None
    delivered_step: Annotated[int, Field(ge=0, le=2**53)] | None = None
    experiment_id: str | None = None
    folder: str | None = None
    datasets: tuple[DatasetRecord, ...] = ()


_SINCE = {"experiment_id", "folder", "datasets"}  # fields that files of the first version lack
_ADAPTER = TypeAdapter(RunRecord)


class RunRecordFile:
    """A RunRecord on disk; updates are atomic, and safe from several threads."""

    def __init__(self, path: Path, record: RunRecord) -> None:
        self.path = path
        self.record = record
        self._lock = threading.Lock()

    def update(self, **changes: Any) -> None:  # noqa: ANN401 - the fields' own types
        """Changes fields and puts the file in the place of the old one."""
        with self._lock:
            self.record = replace(self.record, **changes)
            write_atomically(self.path, json.dumps(asdict(self.record), indent=1).encode("ascii") + b"\n")


def new_key() -> str:
    """A key that no other run has."""
    return uuid.uuid4().hex


def read_record(path: Path) -> RunRecord:
    """Reads tracking.json. Raises InputError for anything else, naming the field."""
    try:
        content = path.read_bytes()
        values = json.loads(content)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the folder of a tracked run, such as runs/NAME-TIME") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot read this run's tracking record: {error}") from None
    names = {field.name for field in fields(RunRecord)}
    if not isinstance(values, dict) or set(values) | _SINCE != names:
        raise InputError(f"{path}: not a tracking record: its fields are {', '.join(sorted(names))}")
    try:
        record = _ADAPTER.validate_json(content, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise InputError(f"{path}: {where} = {excerpt(problem['input'])}: {problem['msg']}") from None
    return replace(record, params=masked(record.params), tags=masked(record.tags))


def masked(values: Mapping[str, str]) -> dict[str, str]:
    """The values without secrets."""
    return {key: mask_secrets(value) for key, value in values.items()}


def artifact_files(record: RunRecord, run_dir: Path) -> list[Path]:
    """The record's artifacts, where they are: at their path if that is in the run's folder or its study's, else by name
    in the run's folder, which may have moved. Others are left out: a record may come from elsewhere.
    """
    study = run_dir.resolve().parent
    found = []
    for text in record.artifacts:
        places = [Path(text), run_dir / Path(text).name]
        found += [place for place in places if place.is_file() and place.resolve().is_relative_to(study)][:1]
    return found
