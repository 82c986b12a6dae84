"""A Sparse-BitNet layer's weight under ZeRO-3: hidden from DeepSpeed's hooks, gathered once a step for its codes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_sbn.functional.weight_handle import LocalWeight


class Zero3Weight(LocalWeight):
    """A weight of which this rank keeps 1/dp under ZeRO-3; whole ones exist for the length of a block."""

    is_sharded = True
    _parameter: Any  # an nn.Parameter with the attributes that DeepSpeed gives it

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight)
        self._parameter = weight
        self._anchor = torch.zeros((), dtype=weight.dtype, device=weight.device, requires_grad=True)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the whole weight of this tensor-parallel rank."""
        rows, columns = self._parameter.ds_shape
        return rows, columns

    @property
    def anchor(self) -> Tensor:
        """A scalar: the gradient goes past autograd, because the parameter has no elements most of the time."""
        return self._anchor

    @contextlib.contextmanager
    def gathered(self) -> Iterator[Tensor]:
        """The weight, gathered from the data-parallel replicas, all of which take part."""
        with deepspeed.zero.GatheredParameters([self._parameter]):
            yield self._parameter.detach()

    def local_shard(self) -> tuple[int, Tensor]:
        """This rank's run of the flattened weight; DeepSpeed pads the last one, which is cut off."""
        kept: Tensor = self._parameter.ds_tensor
        first = dist.get_rank(self._parameter.ds_process_group) * kept.numel()
        return first, kept.detach()[: max(0, min(kept.numel(), self._parameter.ds_numel - first))]

    def accumulate(self, dw: Tensor) -> Tensor | None:
        """Adds to the parameter's whole gradient, which ZeRO reduces at the end of the step."""
        parameter = self._parameter
        if parameter.grad is not None:
            parameter.grad.add_(dw)
            return None
        # A gradient is only taken in the shape of its parameter.
        kept, parameter.data = parameter.data, dw
        parameter.grad = dw
        parameter.data = kept
        return None
