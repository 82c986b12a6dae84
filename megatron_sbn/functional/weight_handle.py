"""Where a layer's latent weight lives and where its gradient goes: on one rank, or sharded over data parallelism.

A linear layer reads its codes, not W. Of W it needs a place in the autograd graph and a destination for dW, so it works
with a store:

    anchor            the tensor that represents W in the autograd graph
    gathered()        all of W for the length of a block; only floating formats and SR-STE need it
    accumulate(dw)    takes dW; returns what autograd is to add up, None if the store added it up itself
    local_shard()     the elements that this rank keeps; scales and telemetry need no more

Under ZeRO-3 (`parallel.zero.Zero3Weight`) the local shard is 1/dp of W, and forward and backward of ternary layers
gather nothing of it.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class LocalWeight:
    """W as a tensor of this rank, usually a parameter; autograd adds up its gradient."""

    is_sharded = False  # whether each data-parallel rank holds a shard of W

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of this rank's weight."""
        rows, columns = self._weight.shape
        return rows, columns

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Its own, fp32 as a rule."""
        return self._weight.dtype

    @property
    def anchor(self) -> Tensor:
        """A tensor that requires a gradient where W does."""
        return self._weight

    @contextlib.contextmanager
    def gathered(self) -> Iterator[Tensor]:
        """W [out, in], detached, for the length of the block. A collective of all ranks that hold a shard."""
        yield self._weight.detach()

    def local_shard(self) -> tuple[int, Tensor]:
        """Return (index of the first element, values [count]) of what this rank keeps of W.flatten()."""
        return 0, self._weight.detach().reshape(-1)

    def accumulate(self, dw: Tensor) -> Tensor | None:
        """Takes dW [out, in] of one backward pass; returns it if autograd is to add it to the anchor's gradient."""
        return dw
