"""`sbn checkpoint average`: the mean of the weights of several checkpoints, as a checkpoint to start from.

W = (W_1 + ... + W_n) / n, summed in fp64, rounded once. There is no optimizer state: use it by `start_with: weights`.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_sbn.atomic_files import flush_to_disk
from megatron_sbn.checkpoint import directory
from megatron_sbn.checkpoint.manifest import MANIFEST, STATE, Manifest, manifest_text, read_state, state_text
from megatron_sbn.checkpoint.regions import FlatRange, Region
from megatron_sbn.checkpoint.run_state import parameter_names
from megatron_sbn.checkpoint.shards import Chunk, Reader, Written, describe, merge, write_chunks
from megatron_sbn.errors import CheckpointError, InputError
from megatron_sbn.runs.folder import CHECKPOINTS


def average(sources: Sequence[str], output: Path) -> Path:
    """Writes the mean of the checkpoints (each RUN[@STEP]) as the checkpoint `output`; returns it.

    Raises:
        CheckpointError: one is not valid, or they are of different models.
        InputError: fewer than two, or `output` exists or cannot be written.
    """
    if len(sources) < 2:
        raise InputError(f"{' '.join(sources)}: an average takes two checkpoints or more")
    if output.absolute().parent.name == CHECKPOINTS:
        raise InputError(f"--output {output}: is among a run's own checkpoints; name a folder elsewhere")
    if output.exists():
        raise InputError(f"--output {output}: exists already; name another")
    paths = [directory.resolve(source) for source in sources]
    if len(set(paths)) < len(paths):
        raise InputError(f"{' '.join(sources)}: one checkpoint is named twice; name different ones")
    manifests = [directory.verify(path) for path in paths]
    names = sorted(parameter_names(list(manifests[0].tensors)))
    for path, manifest in zip(paths, manifests, strict=True):
        _check_same(names, manifests[0], manifest, path)
    partial = output.with_name(f".{output.name}{directory.PARTIAL}")
    try:
        partial.mkdir(parents=True)
        written = write_chunks(partial, 0, [_mean(name, paths, manifests) for name in names])
        state = read_state(paths[-1]).model_copy(update={"optimizer_steps": 0, "masks": None, "telemetry": None})
        (partial / STATE).write_bytes(state_text(state.model_copy(update={"run_id": None})))
        own = Written({STATE: describe(partial / STATE)}, {})
        (partial / MANIFEST).write_bytes(manifest_text(merge([own, written])))
        flush_to_disk(partial / MANIFEST)
        partial.rename(output)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written: {error.strerror or error}; name another") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _check_same(names: list[str], first: Manifest, other: Manifest, path: Path) -> None:
    found = parameter_names(list(other.tensors))
    differs = sorted(set(names) ^ set(found)) or [n for n in names if first.tensors[n].shape != other.tensors[n].shape]
    if differs:
        raise CheckpointError(f"{path}: {differs[0]} is not as in the first; average checkpoints of one model")


def _mean(name: str, paths: list[Path], manifests: list[Manifest]) -> Chunk:
    shape = manifests[0].tensors[name].shape
    everything = Region((0,) * len(shape), shape)
    total = torch.zeros(everything.numel, dtype=torch.float64)
    value = torch.empty(everything.numel)
    for path, manifest in zip(paths, manifests, strict=True):
        with Reader(path, manifest) as reader:
            reader.fill(value, name, shape, [FlatRange(everything, 0)])
        total += value
    return Chunk(name, shape, everything, (total / len(paths)).float().view(shape))
