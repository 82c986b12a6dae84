"""The collectives of one layer under tensor and sequence parallelism.

column-parallel (rows of W sharded)     forward: X_q and s_x all-gathered as int8 and fp32 (sequence parallelism)
                                        backward: the same, during the product for dX; then dX summed, or
                                        reduce-scattered over the tokens, during the product for dW
row-parallel (columns of W sharded)     forward: MAX of the tokens' magnitudes, exact SUM of the accumulators
                                        backward: dY all-gathered (sequence parallelism)
"""

import torch.distributed as dist
from torch import Tensor

from megatron_sbn.functional.collectives import AsyncTensor, LocalCollectives


class ColumnParallelCollectives(LocalCollectives):
    """Every rank has all input features and some outputs; under sequence parallelism, some of the tokens."""

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
        self.group, self.sequence_parallel = group, sequence_parallel

    def gather_input(self, t: Tensor) -> Tensor:
        """[tokens/tp, ...] -> [tokens, ...] under sequence parallelism."""
        return _all_gather(t, self.group)() if self.sequence_parallel else t

    def start_gather_input(self, t: Tensor) -> AsyncTensor:
        """Begins `gather_input`."""
        return _all_gather(t, self.group, async_op=True) if self.sequence_parallel else lambda: t

    def reduce_grad_input(self, dx: Tensor) -> Tensor:
        """Sums the partial input gradients; under sequence parallelism each rank keeps its tokens."""
        return _reduce(dx, self.group, self.sequence_parallel)()

    def start_reduce_grad_input(self, dx: Tensor) -> AsyncTensor:
        """Begins `reduce_grad_input`."""
        return _reduce(dx, self.group, self.sequence_parallel, async_op=True)


class RowParallelCollectives(LocalCollectives):
    """Every rank has some input features of all tokens; outputs are partial sums."""

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
        self.group, self.sequence_parallel = group, sequence_parallel
        self.splits_input = group.size() > 1

    def token_abs_max(self, a: Tensor) -> Tensor:
        """The maximum over the full input dimension, fp32 per token."""
        if self.group.size() > 1:
            a = a.clone()
            dist.all_reduce(a, dist.ReduceOp.MAX, group=self.group)
        return a

    def reduce_accumulator(self, acc: Tensor) -> Tensor:
        """Exact sum of integer accumulators; under sequence parallelism each rank keeps its tokens."""
        return _reduce(acc, self.group, self.sequence_parallel)()

    def local_tokens(self, s_x: Tensor) -> Tensor:
        """This rank's tokens of [tokens, ...] under sequence parallelism."""
        return s_x.chunk(self.group.size())[self.group.rank()] if self.sequence_parallel else s_x

    def gather_grad_output(self, dy: Tensor) -> Tensor:
        """[tokens/tp, ...] -> [tokens, ...] under sequence parallelism."""
        return _all_gather(dy, self.group)() if self.sequence_parallel else dy


class _Started:
    """A collective's result, for whoever calls this; what was given to it lives until then.

    On CUDA it is the current stream that waits, not this process.
    """

    def __init__(self, work: dist.Work | None, result: Tensor, given: Tensor) -> None:
        self._work, self._result, self._given = work, result, given

    def __call__(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        self._work, self._given = None, self._result
        return self._result


def _all_gather(t: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> AsyncTensor:
    """Concatenates along dim 0 over the group."""
    t = t.contiguous()
    gathered = t.new_empty((t.shape[0] * group.size(), *t.shape[1:]))
    return _Started(dist.all_gather_into_tensor(gathered, t, group=group, async_op=async_op), gathered, t)


def _reduce(t: Tensor, group: dist.ProcessGroup, scatter: bool, async_op: bool = False) -> AsyncTensor:
    """Sums over the group; with `scatter`, each rank keeps its share of dim 0."""
    if group.size() == 1:
        return lambda: t
    t = t.contiguous()
    if not scatter:
        return _Started(dist.all_reduce(t, group=group, async_op=async_op), t, t)
    share = t.new_empty((t.shape[0] // group.size(), *t.shape[1:]))
    return _Started(dist.reduce_scatter_tensor(share, t, group=group, async_op=async_op), share, t)
