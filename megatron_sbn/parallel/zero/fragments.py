"""Which elements of a parameter's fp32 master and moments this rank keeps, under ZeRO-1 and -2 and under ZeRO-3."""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A run of a flattened parameter, from `start` on, of which this rank keeps master and moments.

    `tensors` are views, fp32 [elements of the run], by the names "master", "exp_avg", "exp_avg_sq".
    """

    start: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Place:
    """Elements `start` to `start + length` of a flattened parameter are those from `offset` on of a flat master."""

    master: Tensor
    offset: int
    start: int
    length: int


def flat_place(zero: Any, parameter: Any) -> Place | None:  # noqa: ANN401 - DeepSpeed's own
    """ZeRO-1 and -2: parameters of a group lie one after the other, divided anywhere."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    held, own = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Place(zero.single_partition_of_fp32_groups[mapping.param_group_index], held.start, own.start, own.numel)


def sharded_place(zero: Any, parameter: Any) -> Place | None:  # noqa: ANN401 - DeepSpeed's own
    """ZeRO-3: each parameter is divided into equal parts, the last of which is padded."""
    group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
    start = dist.get_rank(parameter.ds_process_group) * padded
    length = max(0, min(padded, parameter.ds_numel - start))
    return Place(zero.fp32_partitioned_groups_flat[group], offset, start, length) if length else None
