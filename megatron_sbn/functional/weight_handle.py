"""Where a layer's latent weight lives and where its gradient goes: whole on the rank, or cut over data parallelism.

A linear layer reads its codes, not W; what it needs of W is a place in the autograd graph, and a destination for dW.
So it works with a store:

    anchor            what stands for W in the graph
    whole()           W itself, for as long as a block lasts; what only floating formats and SR-STE ask for
    accumulate(dw)    hands dW over: what is returned is autograd's to add up, None if that was done here
    fragment()        what is on this rank for good: scales and telemetry need no more

Under ZeRO-3 (`parallel.zero.Zero3Weight`) the fragment is 1/dp of W, and forward and backward of ternary layers gather
nothing of it.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class LocalWeight:
    """W as a tensor of this rank, usually a parameter; autograd adds its gradient up."""

    is_cut = False  # whether data-parallel replicas hold a fragment each

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
    def whole(self) -> Iterator[Tensor]:
        """W [out, in], detached, for the length of the block; all ranks that hold a part take part."""
        yield self._weight.detach()

    def fragment(self) -> tuple[int, Tensor]:
        """(first element, values [count]) of what this rank keeps of W.flatten()."""
        return 0, self._weight.detach().reshape(-1)

    def accumulate(self, dw: Tensor) -> Tensor | None:
        """Takes dW [out, in] of one backward pass; returns it if autograd is to add it to the anchor's gradient."""
        return dw
