"""Bytes that this process sends, by group and kind of collective.

    kind             bytes that one of n ranks sends
    all_reduce       2 (n - 1)/n S         S: bytes of the tensor
    all_gather       (n - 1) S             S: bytes of this rank's share
    reduce_scatter   (n - 1)/n S           S: bytes of the input
    all_to_all       S - S/n               S: bytes of the input; with given splits, what is not this rank's own part
    reduce, gather   S                     S: bytes of the tensor; 0 on the root
    scatter          (n - 1)/n S           S: bytes of all parts; 0 but on the root
    broadcast        S                     S: bytes of the tensor; 0 but on the root
    send             S                     S: bytes of the tensor; receiving is free

These are the least that the operations need (rings for the first three), whatever a library's algorithm sends. Nothing
is sent in a group of one.

Every collective that starts in Python, whether from this project, Megatron-Core or DeepSpeed, is a method call on a
`torch.distributed.ProcessGroup`: counting wrappers around these methods see them all, for every backend, and cost
microseconds. Coalesced calls (NCCL's batched sends, say) are either such a call each, or one with several tensors.
Groups are told apart by their names: several may have the same ranks.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state as megatron_state
from torch import Tensor

from megatron_sbn.parallel.state import ParallelState

Totals = dict[tuple[str, str], tuple[int, float]]
"""(group, kind) -> (collectives, bytes that this rank sends)."""

# Method of ProcessGroup -> (kind, position of what this rank gives among the arguments).
METHODS: Mapping[str, tuple[str, int]] = {
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce", 0),
    "allgather": ("all_gather", 1),
    "_allgather_base": ("all_gather", 1),
    "all_gather_single": ("all_gather", 1),
    "all_gather_single_coalesced": ("all_gather", 1),
    "allgather_coalesced": ("all_gather", 1),
    "allgather_into_tensor_coalesced": ("all_gather", 1),
    "reduce_scatter": ("reduce_scatter", 1),
    "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "alltoall": ("all_to_all", 1),
    "alltoall_base": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 1),
    "reduce": ("reduce", 0),
    "gather": ("gather", 1),
    "gather_single": ("gather", 1),  # from torch 2.14 on, as the next
    "gather_into_tensor": ("gather", 1),
    "scatter": ("scatter", 1),
    "broadcast": ("broadcast", 0),
    "send": ("send", 0),
}

ROOTED = (dist.BroadcastOptions, dist.ReduceOptions, dist.GatherOptions, dist.ScatterOptions)

PER_STEP = ("tensor", "pipeline", "data", "expert")
"""Groups whose bytes are metrics."""


class CommCounter:
    """Counts this process's collectives for as long as the context lasts.

    Args:
        names: name of each group, by `ProcessGroup.group_name`; groups that are not named are "other".
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = dict(names)
        self._totals: Totals = {}
        self._installed = contextlib.ExitStack()

    def __enter__(self) -> "CommCounter":
        """Begins to count."""
        known = vars(dist.ProcessGroup)  # which of the methods exist depends on torch's version
        for method, (kind, position) in METHODS.items():
            if method in known:
                counting = self._counting(known[method], kind, position)
                self._installed.enter_context(mock.patch.object(dist.ProcessGroup, method, counting))
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Leaves the groups as they were."""
        self._installed.close()

    def restart(self) -> None:
        """Forgets what was counted."""
        self._totals = {}

    def totals(self) -> Totals:
        """What was counted since the start or `restart`, of every (group, kind) that was used at all."""
        return dict(self._totals)

    def _counting(self, method: Callable[..., Any], kind: str, position: int) -> Callable[..., Any]:
        def collective(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any method's
            self._count(group, kind, position, (*args, *kwargs.values()))
            return method(group, *args, **kwargs)

        return collective

    def _count(self, group: dist.ProcessGroup, kind: str, position: int, args: tuple[Any, ...]) -> None:
        name = self.names.get(group.group_name, "other")
        if kind == "send" and name == "world":
            # Megatron-Core lends the world's group to a pipeline of two stages, for one of its two directions.
            name = "pipeline"
        count, total = self._totals.get((name, kind), (0, 0.0))
        volume = _volume(kind, position, args, group.size(), group.rank()) if group.size() > 1 else 0.0
        self._totals[name, kind] = (count + 1, total + volume)


def _volume(kind: str, position: int, args: tuple[Any, ...], size: int, rank: int) -> float:
    """The table of the module, for n = `size`."""
    given = args[position]
    if kind == "all_reduce":
        return 2 * (size - 1) / size * _bytes(given)
    if kind == "all_gather":
        return float((size - 1) * _bytes(given))
    if kind == "reduce_scatter":
        return (size - 1) / size * _bytes(given)
    if kind == "all_to_all":
        return _bytes(given) - _own_part(given, args, size, rank)
    if kind == "send":
        return float(_bytes(given))
    is_root = rank == _root(args)
    if kind in ("reduce", "gather"):
        return 0.0 if is_root else float(_bytes(given))
    if kind == "scatter":
        return (size - 1) / size * _bytes(given) if is_root else 0.0
    return float(_bytes(given)) if is_root else 0.0


def _bytes(given: Any) -> int:  # noqa: ANN401 - a tensor, or a list of them or of lists
    return given.nbytes if isinstance(given, Tensor) else sum(_bytes(part) for part in given)


def _own_part(given: Any, args: tuple[Any, ...], size: int, rank: int) -> float:  # noqa: ANN401 - as above
    """Bytes of an all-to-all's input that stay on this rank."""
    if not isinstance(given, Tensor):
        return float(given[rank].nbytes)
    splits = args[3] if len(args) > 3 else ()
    if not splits:
        return given.nbytes / size
    return float(given[: splits[rank]].nbytes)


def _root(args: tuple[Any, ...]) -> int:
    """The root's rank in the group: an argument of its own, or one of the options."""
    for argument in args[1:]:
        if isinstance(argument, int):
            return argument
        if isinstance(argument, ROOTED):
            return int(argument.rootRank)
    return 0


def group_names(parallel: ParallelState) -> dict[str, str]:
    """Names of the groups of a run; what ZeRO does over the experts' replicas is data parallelism too."""
    optional = {"check_initialized": False}
    groups = (
        ("tensor", parallel.tensor.group),
        ("pipeline", parallel.pipeline.group),
        ("data", parallel.data.group),
        ("data", parallel.tensor_data_group),
        ("model", parallel.model_group),
        ("model", parallel.expert_model_group),
        ("world", dist.group.WORLD),
        ("tensor", megatron_state.get_tensor_and_context_parallel_group(**optional)),
        ("data", megatron_state.get_data_parallel_group(with_context_parallel=True)),
        ("data", megatron_state.get_tensor_and_data_parallel_group(with_context_parallel=True)),
        ("pipeline", megatron_state.get_embedding_group(**optional)),
        ("pipeline", megatron_state.get_position_embedding_group(**optional)),
        ("expert", megatron_state.get_expert_model_parallel_group(**optional)),
        ("expert", megatron_state.get_expert_tensor_and_model_parallel_group(**optional)),
        ("tensor", megatron_state.get_expert_tensor_parallel_group(**optional)),
        ("data", megatron_state.get_expert_data_parallel_group(**optional)),
    )
    names: dict[str, str] = {}
    for name, group in groups:
        if isinstance(group, dist.ProcessGroup):
            names.setdefault(group.group_name, name)
    return names


def step_metrics(totals: Totals, parallel: ParallelState) -> dict[str, float]:
    """`bytes_GROUP` of one step, the sum over all ranks; without groups of one. A collective: all ranks call it."""
    volumes = [math.fsum(total for (group, _), (_, total) in totals.items() if group == name) for name in PER_STEP]
    summed = torch.tensor(volumes, dtype=torch.float64, device=parallel.device)
    dist.all_reduce(summed)
    expert_size = megatron_state.get_expert_model_parallel_world_size()
    sizes = (parallel.tensor.size, parallel.pipeline.size, parallel.data.size, expert_size)
    return {
        f"bytes_{name}": value for name, size, value in zip(PER_STEP, sizes, summed.tolist(), strict=True) if size > 1
    }
