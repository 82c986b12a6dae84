"""`sbn checkpoint show` and `verify`: one checkpoint, or all of a run. Without torch, so on a login node too."""

import sys
from pathlib import Path

from megatron_sbn.checkpoint import directory as folders
from megatron_sbn.checkpoint.manifest import MANIFEST, Manifest, State, read_manifest, read_state
from megatron_sbn.errors import CheckpointError
from megatron_sbn.runs.folder import CHECKPOINTS
from megatron_sbn.text_table import aligned, size_text


def show(path: Path, tensors: bool) -> int:
    """Prints what checkpoints hold, by their manifests. Raises CheckpointError where one cannot be read."""
    for checkpoint, mark in _checkpoints(path):
        manifest, state = read_manifest(checkpoint), read_state(checkpoint)
        print("\n".join([f"{checkpoint.name}{mark}  {checkpoint}", *_rows(manifest, state)]))
        if tensors:
            rows = [
                (name, tensor.dtype, " x ".join(map(str, tensor.shape)), str(len(tensor.boxes)))
                for name, tensor in sorted(manifest.tensors.items())
            ]
            print("\n".join(aligned(("tensor", "type", "shape", "boxes"), rows)))
    print("files: not verified; `sbn checkpoint verify` reads them all")
    return 0


def verify(path: Path) -> int:
    """Reads every file and compares it with the manifest; returns 0, or 4 where one is not valid."""
    status = 0
    for checkpoint, mark in _checkpoints(path):
        try:
            manifest = folders.verify(checkpoint)
        except CheckpointError as error:
            print(f"sbn: {error}", file=sys.stderr)
            status = error.status
        else:
            print(f"{checkpoint}{mark}: valid, {len(manifest.files)} files of {size_text(manifest.bytes)}")
    return status


def _checkpoints(path: Path) -> list[tuple[Path, str]]:
    """The checkpoint at the path, or those of the run there, newest first; each with what is to be said of it."""
    if (path / MANIFEST).exists() or folders.step_of(path) is not None:
        return [(path, "")]
    for folder in (path, path / CHECKPOINTS):
        found = folders.saved(folder)
        if found:
            newest = folders.newest(folder)
            return [(one, "  (in force)" if one == newest else "") for one in found]
    raise CheckpointError(f"{path}: there is no checkpoint; name one, or a run's folder")


def _rows(manifest: Manifest, state: State) -> list[str]:
    data = state.data
    masks = f"{state.masks[0]}:{state.masks[1]}, saved" if state.masks else "made from the weights"
    parameters = sum(
        _numel(tensor.shape)
        for name, tensor in manifest.tensors.items()
        if tensor.dtype == "F32" and not name.startswith("optimizer.")
    )
    rows = (
        ("step", f"step {state.step}, {state.optimizer_steps} updates"),
        ("saved at", state.layout.describe()),
        ("tensors", f"{len(manifest.tensors)}, of {parameters:,} parameters"),
        ("size", f"{size_text(manifest.bytes)} in {len(manifest.files)} files"),
        ("data", f"{data.batches} batches of {data.global_batch_size} x {data.seq_length} tokens, seed {data.seed}"),
        ("masks", masks),
        ("mlflow", state.run_id or "no run"),
        ("version", state.version),
    )
    return [f"  {name.ljust(9)} {text}" for name, text in rows]


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
