"""What a checkpoint says about itself, in JSON: manifest.json (files, checksums, tensors) and state.json (the rest).

    manifest.json  {"sha256": of the content below, as `_canonical` writes it,
                    "content": {"format": 2, "files": {NAME: {"bytes", "sha256"}},
                                "tensors": {NAME: {"dtype", "shape", "boxes": [{"file", "offsets", "sizes"}]}}}}
    state.json     step, layout at which it was saved, data position, optimizer and telemetry counters, MLflow run

Names of files are plain and of known forms, so nothing in a manifest leads out of its folder. Imports no torch.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_sbn.errors import CheckpointError

MANIFEST, STATE = "manifest.json", "state.json"
FILE_NAME = re.compile(r"state\.json|shard-\d{5}-\d{1,4}\.safetensors")
LARGEST = 1 << 62

Count = Annotated[int, Field(ge=0, le=LARGEST)]
Group = Annotated[int, Field(ge=1, le=32)]
Sparsity = tuple[Group, Group]  # N and M
Dimensions = Annotated[tuple[Count, ...], Field(min_length=1, max_length=2)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Model = TypeVar("Model", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class File(_Strict):
    """A file of the checkpoint: its size and the SHA-256 of its content, in hexadecimal."""

    bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SavedRegion(_Strict):
    """Where a region of a logical tensor is: in `file`, under the tensor's name."""

    file: str
    offsets: Dimensions
    sizes: Dimensions


Dtype = Literal["F32", "U8"]


class SavedTensor(_Strict):
    """A logical tensor: the boxes cover it once."""

    dtype: Dtype
    shape: Dimensions
    boxes: tuple[SavedRegion, ...]


class Manifest(_Strict):
    """The content of manifest.json."""

    format: Literal[2] = 2
    files: dict[str, File]
    tensors: dict[str, SavedTensor]

    @property
    def bytes(self) -> int:
        """Of all files that it names."""
        return sum(file.bytes for file in self.files.values())


class Layout(_Strict):
    """The layout at which a checkpoint was saved; it opens at any other."""

    tensor: Count
    pipeline: Count
    data: Count
    virtual_pipeline: Count = 1
    expert: Count = 1
    zero_stage: Count

    def describe(self) -> str:
        """In one phrase."""
        virtual = f", {self.virtual_pipeline} virtual stages" if self.virtual_pipeline > 1 else ""
        expert = f", expert {self.expert}" if self.expert > 1 else ""
        ranks = self.tensor * self.pipeline * self.data
        return (
            f"tensor {self.tensor} x pipeline {self.pipeline}{virtual} x data {self.data}{expert}, "
            f"ZeRO-{self.zero_stage}, {ranks} rank{'s' if ranks > 1 else ''}"
        )


class DataPosition(_Strict):
    """What decides the next batch: the order of samples, and how many batches have been read."""

    batches: Count
    seed: int
    global_batch_size: Count
    seq_length: Count


class TelemetryState(_Strict):
    """Telemetry's counters; its reference masks are tensors."""

    step: Count
    flips: Count
    sparsity: Sparsity


class State(_Strict):
    """The content of state.json.

    Attributes:
        step: optimizer steps that are done, on which every schedule depends.
        optimizer_steps: updates that Adam has counted (its bias correction).
        masks: N and M of the masks that the weights alone do not give; None where there are none.
        run_id: of MLflow; None where the run had none yet.
        bad_steps: how many were refused so far; losses, norms: of the last accepted ones, for the next to be judged by.
    """

    step: Count
    layout: Layout
    data: DataPosition
    optimizer_steps: Count
    masks: Sparsity | None = None
    telemetry: TelemetryState | None = None
    run_id: str | None = None
    bad_steps: Count = 0
    losses: tuple[Finite, ...] = ()
    norms: tuple[Finite, ...] = ()
    version: str = ""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError where it is missing, torn or altered."""
    path = folder / MANIFEST
    value = _json(path)
    if not isinstance(value, dict) or set(value) != {"sha256", "content"}:
        raise CheckpointError(f"{path}: has no checksum of its content; it is no manifest of this format")
    if value["sha256"] != _digest(value["content"]):
        raise CheckpointError(f"{path}: does not match its own checksum")
    manifest = _validated(Manifest, value["content"], path)
    for name in manifest.files:
        if not FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{path}: {name[:80]!r} is no name of a checkpoint's file")
    for name in {region.file for tensor in manifest.tensors.values() for region in tensor.boxes}:
        if name not in manifest.files:
            raise CheckpointError(f"{path}: {name[:80]!r} holds tensors and is not among the files")
    if STATE not in manifest.files:
        raise CheckpointError(f"{path}: {STATE} is not among the files")
    return manifest


def read_state(folder: Path) -> State:
    """The state of a checkpoint. Raises CheckpointError where it cannot be read."""
    return _validated(State, _json(folder / STATE), folder / STATE)


def manifest_text(manifest: Manifest) -> bytes:
    """What manifest.json holds."""
    content = manifest.model_dump(mode="json")
    return json.dumps({"sha256": _digest(content), "content": content}).encode("ascii") + b"\n"


def state_text(state: State) -> bytes:
    """What state.json holds."""
    return json.dumps(state.model_dump(mode="json"), indent=2).encode("ascii") + b"\n"


def _digest(content: object) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")


def _json(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {str(error)[:100]}") from None


def _validated(kind: type[Model], value: object, path: Path) -> Model:
    try:
        return kind.model_validate_json(json.dumps(value))  # JSON's lists are tuples to a strict model
    except (ValidationError, RecursionError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(str(part)[:60] for part in first["loc"])
        raise CheckpointError(f"{path}: {where or 'content'}: {str(first['msg'])[:100]}") from None
