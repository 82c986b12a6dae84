"""Checkpoints that resume a run bit for bit at the layout that they were saved at.

    checkpoints/step-00000100/   state.json              step, layout, what the files are
                                 weights-t0-p0.safetensors    parameters and masks of one tensor and pipeline rank
                                 experts-e0-p0.safetensors    those of experts, of one expert and pipeline rank
                                 optimizer-00000.safetensors  fp32 masters and Adam moments of one rank
    checkpoints/latest           text: the name of the newest whole one

A checkpoint is written under a temporary name and renamed when every rank has finished, then `latest` is replaced: a
killed run leaves the one before it in force. Tensors are safetensors, the rest is JSON: opening one executes nothing.
gamma and codes are derived from the weights and never saved.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_sbn.errors import CheckpointError, InputError
from megatron_sbn.parallel.shard import is_expert
from megatron_sbn.parallel.state import ParallelState
from megatron_sbn.staging import flush_to_disk, write_whole

LATEST = "latest"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Layout:
    """What must be equal between saving and resuming."""

    tensor: int
    pipeline: int
    data: int
    virtual_pipeline: int
    zero_stage: int
    expert: int = 1

    def describe(self) -> str:
        """As recipe keys."""
        return (
            f"parallel.tensor={self.tensor} parallel.pipeline={self.pipeline} "
            f"parallel.virtual_pipeline={self.virtual_pipeline} parallel.expert={self.expert} "
            f"parallel.zero_stage={self.zero_stage} "
            f"on {self.tensor * self.pipeline * self.data} ranks"
        )


@dataclass(frozen=True)
class Snapshot:
    """This rank's tensors: `weights` are equal on all replicas of each, `optimizer` is this rank's own."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


def newest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names; None where there is none. Raises CheckpointError if it is not there."""
    pointer = folder / LATEST
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{pointer}: cannot be read: {error}") from None
    path = folder / name
    if Path(name).name != name or not (path / "state.json").is_file():
        raise CheckpointError(f"{pointer}: names {name!r}, which is no whole checkpoint; name another one in it")
    return path


def save(folder: Path, step: int, layout: Layout, snapshot: Snapshot, parallel: ParallelState, keep: int) -> Path:
    """Writes checkpoints/step-N and makes it the latest, on all ranks together; keeps the newest `keep`.

    Raises CheckpointError on every rank when one of them cannot write; the older checkpoints stay as they were.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}{_PARTIAL}"
    _together(parallel, final, lambda: _make_empty(partial) if parallel.rank == 0 else None)
    _together(parallel, final, lambda: _write_tensors(partial, snapshot, parallel))
    _together(parallel, final, lambda: _finish(partial, final, step, layout, keep) if parallel.rank == 0 else None)
    return final


def load(path: Path, layout: Layout, parallel: ParallelState) -> tuple[int, Snapshot]:
    """(step, this rank's tensors) of a checkpoint, on all ranks together.

    Raises CheckpointError on every rank for another layout, or where one rank's file is damaged.
    """
    problem, loaded = "", None
    try:
        loaded = _load(path, layout, parallel)
    except CheckpointError as error:
        problem = str(error)
    if _any_rank(problem, parallel) or loaded is None:
        raise CheckpointError(problem or f"{path}: cannot be read by another rank, see its message")
    return loaded


def _load(path: Path, layout: Layout, parallel: ParallelState) -> tuple[int, Snapshot]:
    state_file = path / "state.json"
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
        step, saved = int(state["step"]), Layout(**state["layout"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{state_file}: cannot be read: {error}; resume from an older checkpoint") from None
    if saved != layout:
        raise CheckpointError(
            f"{path}: was saved at {saved.describe()} and this run has {layout.describe()}; resume at the saved layout"
        )
    weights = _read_tensors(path / _weights_name(parallel))
    experts = path / _experts_name(parallel)
    if experts.exists():
        weights |= _read_tensors(experts)
    return step, Snapshot(weights, _read_tensors(path / _optimizer_name(parallel)))


def restore(target: Tensor, tensors: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Copies the saved tensor `name` into `target`. Raises CheckpointError if it is missing or of another shape."""
    saved = tensors.get(name)
    if saved is None or saved.shape != target.shape:
        found = "no tensor" if saved is None else f"shape {list(saved.shape)}"
        raise CheckpointError(f"{path}: {name} has {found}, this recipe needs {list(target.shape)}; use its own recipe")
    with torch.no_grad():
        target.copy_(saved)


def section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _weights_name(parallel: ParallelState) -> str:
    return f"weights-t{parallel.tensor_rank}-p{parallel.pipeline_rank}.safetensors"


def _experts_name(parallel: ParallelState) -> str:
    return f"experts-e{parallel.expert_rank}-p{parallel.pipeline_rank}.safetensors"


def _optimizer_name(parallel: ParallelState) -> str:
    return f"optimizer-{parallel.rank:05d}.safetensors"


def _together(parallel: ParallelState, path: Path, action: Callable[[], None]) -> None:
    """Runs a step of saving on every rank; if it fails on one, all of them raise."""
    problem = ""
    try:
        action()
    except (OSError, InputError, SafetensorError) as error:
        problem = str(error)
    if _any_rank(problem, parallel):
        shutil.rmtree(path.with_name(f".{path.name}{_PARTIAL}"), ignore_errors=True)
        reason = problem or "another rank failed, see its message"
        raise CheckpointError(f"{path}: cannot be saved on rank {parallel.rank}: {reason}; older checkpoints are whole")


def _any_rank(problem: str, parallel: ParallelState) -> bool:
    """Whether any rank has a problem to tell."""
    count = torch.tensor(int(bool(problem)), device=parallel.device)
    dist.all_reduce(count)
    return bool(count)


def _make_empty(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for stale in partial.parent.glob(f".step-*{_PARTIAL}"):
        shutil.rmtree(stale)
    partial.mkdir()


def _write_tensors(partial: Path, snapshot: Snapshot, parallel: ParallelState) -> None:
    experts = {name: tensor for name, tensor in snapshot.weights.items() if is_expert(name)}
    if parallel.data_rank == 0:
        rest = {name: tensor for name, tensor in snapshot.weights.items() if name not in experts}
        _write_file(partial / _weights_name(parallel), rest)
    if experts and parallel.expert_data_group.rank() == 0:
        _write_file(partial / _experts_name(parallel), experts)
    _write_file(partial / _optimizer_name(parallel), snapshot.optimizer)


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    flush_to_disk(path)


def _finish(partial: Path, final: Path, step: int, layout: Layout, keep: int) -> None:
    state = {"step": step, "layout": asdict(layout)}
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    flush_to_disk(partial / "state.json")
    flush_to_disk(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    write_whole(final.parent / LATEST, f"{final.name}\n".encode())
    # The one just written stays even where a run went back and continued from an older one.
    others = sorted(path for path in final.parent.glob("step-*") if path != final)
    for old in others[: max(0, len(others) - keep + 1)]:
        shutil.rmtree(old)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; resume from an older checkpoint") from None
    return tensors
