"""Tensors of a checkpoint: safetensors, sharded as torch.distributed.checkpoint's HuggingFaceStorageWriter does.

A file holds boxes under the names of their logical tensors, and in its metadata (DCP_SHARDING_INFO) where each begins:
torch's own HuggingFaceStorageReader opens a checkpoint too, and `consolidate_safetensors_files` makes plain files of
it. A file has a name once: further boxes of a tensor go to a rank's further files, shard-RRRRR-K for K = 0, 1, ...
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_sbn.atomic_files import flush_to_disk
from megatron_sbn.checkpoint.manifest import Dtype, File, Manifest, SavedRegion, SavedTensor
from megatron_sbn.checkpoint.regions import FlatRange, Region, disjoint
from megatron_sbn.errors import CheckpointError

_DTYPES: dict[torch.dtype, Dtype] = {torch.float32: "F32", torch.uint8: "U8"}
_OPEN_FILES = 32


@dataclass(frozen=True)
class Chunk:
    """A region of a logical tensor of shape `shape`, with the values inside it."""

    name: str
    shape: tuple[int, ...]
    region: Region
    value: Tensor  # of the region's sizes


@dataclass(frozen=True)
class Written:
    """What one rank wrote: its share of the manifest."""

    files: dict[str, File]
    tensors: dict[str, SavedTensor]


def write_chunks(folder: Path, rank: int, chunks: Iterable[Chunk]) -> Written:
    """Writes a rank's chunks, flushed to the disk. Raises OSError, SafetensorError."""
    files: list[dict[str, Chunk]] = []
    for chunk in chunks:
        home = next((file for file in files if chunk.name not in file), None)
        if home is None:
            home = {}
            files.append(home)
        home[chunk.name] = chunk
    written = Written({}, {})
    for index, content in enumerate(files):
        name = f"shard-{rank:05d}-{index}.safetensors"
        written.files[name] = _write_file(folder / name, content)
        for chunk in content.values():
            region = SavedRegion(file=name, offsets=chunk.region.offsets, sizes=chunk.region.sizes)
            known = written.tensors.get(chunk.name)
            boxes = (*known.boxes, region) if known else (region,)
            written.tensors[chunk.name] = SavedTensor(dtype=_DTYPES[chunk.value.dtype], shape=chunk.shape, boxes=boxes)
    return written


def _write_file(path: Path, content: dict[str, Chunk]) -> File:
    places = {name: {"saved_offsets": list(chunk.region.offsets)} for name, chunk in content.items()}
    save_file(
        {name: chunk.value.contiguous() for name, chunk in content.items()},
        path,
        metadata={"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"},
    )
    return describe(path)


def describe(path: Path) -> File:
    """Size and checksum of a file, once it is on the disk. Raises OSError."""
    flush_to_disk(path)
    with path.open("rb") as content:
        return File(bytes=path.stat().st_size, sha256=hashlib.file_digest(content, "sha256").hexdigest())


def merge(parts: Sequence[Written]) -> Manifest:
    """The manifest of all ranks' files. Raises CheckpointError where boxes do not cover a tensor exactly once."""
    files: dict[str, File] = {}
    tensors: dict[str, SavedTensor] = {}
    for part in parts:
        files |= part.files
        for name, tensor in part.tensors.items():
            known = tensors.get(name)
            boxes = (*known.boxes, *tensor.boxes) if known else tensor.boxes
            tensors[name] = tensor.model_copy(update={"boxes": boxes})
    for name, tensor in tensors.items():
        check_cover(name, tensor)
    return Manifest(files=files, tensors=tensors)


def check_cover(name: str, tensor: SavedTensor) -> None:
    """Raises CheckpointError where the boxes do not cover the tensor exactly once."""
    whole = Region((0,) * len(tensor.shape), tensor.shape)
    boxes = [Region(region.offsets, region.sizes) for region in tensor.boxes]
    inside = all(len(region.offsets) == len(region.sizes) == len(tensor.shape) for region in boxes) and all(
        region.overlap(whole) == region for region in boxes
    )
    if not inside or sum(region.numel for region in boxes) != whole.numel or not disjoint(boxes):
        raise CheckpointError(f"{name}: its boxes do not cover shape {list(tensor.shape)} exactly once")


class Reader:
    """Reads boxes of logical tensors from a checkpoint's files. To be used as a context, which closes them."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        for name, tensor in manifest.tensors.items():
            check_cover(name, tensor)
        self.folder = folder
        self.manifest = manifest
        self._open: dict[str, tuple[ExitStack, Any]] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.popitem()[1][0].close()

    def fill(self, target: Tensor, name: str, shape: tuple[int, ...], runs: Iterable[FlatRange]) -> None:
        """Writes the saved values into `target` [elements], where each run says.

        Raises CheckpointError where the tensor is missing, of another shape or type, or not there in full.
        """
        saved = self.manifest.tensors.get(name)
        if saved is None or saved.shape != tuple(shape):
            found = "no tensor" if saved is None else f"shape {list(saved.shape)}"
            raise CheckpointError(f"{self.folder}: {name} has {found}, this recipe needs {list(shape)}; use its own")
        if saved.dtype != _DTYPES[target.dtype]:
            raise CheckpointError(f"{self.folder}: {name} is saved as {saved.dtype}, not {_DTYPES[target.dtype]}")
        for run in runs:
            wanted, filled = run.region, 0
            view = target[run.start : run.start + wanted.numel].view(wanted.sizes)
            for region in saved.boxes:
                common = wanted.overlap(Region(region.offsets, region.sizes))
                if common is not None:
                    view[common.within(wanted)] = self._read(region, name, common).to(target.device)
                    filled += common.numel
            if filled != wanted.numel:
                raise CheckpointError(f"{self.folder}: {name} lacks {wanted.numel - filled} of its elements")

    def _read(self, saved: SavedRegion, name: str, part: Region) -> Tensor:
        """The values of a part of a saved region."""
        home = Region(saved.offsets, saved.sizes)
        try:
            held = self._file(saved.file).get_slice(name)
            if tuple(held.get_shape()) != home.sizes:
                raise CheckpointError(f"{self.folder / saved.file}: {name} is not of the manifest's sizes")
            value: Tensor = held[part.within(home)]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / saved.file}: cannot be read: {error}") from None
        return value

    def _file(self, name: str) -> Any:  # noqa: ANN401 - safetensors' handle has no public type
        if name not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open)))[0].close()
            stack = ExitStack()
            self._open[name] = (stack, stack.enter_context(safe_open(self.folder / name, framework="pt")))
        return self._open[name][1]
