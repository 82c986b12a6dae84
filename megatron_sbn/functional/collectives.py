"""The collectives of one linear layer: the only places where tensors of its forward and backward cross ranks."""

from collections.abc import Callable

from torch import Tensor

AsyncTensor = Callable[[], Tensor]
"""A tensor whose collective has begun: calling it waits for the collective and returns the tensor."""


class LocalCollectives:
    """The collectives of a layer on a single device, which move nothing.

    A subclass overrides those that its tensor-parallel layout needs. `start_` methods begin what the method without it
    does, so that GEMMs run meanwhile; nothing writes to their argument before the wait.

    Attributes:
        splits_input: whether X holds a slice of `in` (row-parallel), so that GEMMs give partial sums.
    """

    splits_input: bool = False

    def token_abs_max(self, a: Tensor) -> Tensor:
        """Row-parallel: the maximum over ranks of a [tokens...], in forward."""
        return a

    def gather_input(self, t: Tensor) -> Tensor:
        """Column-parallel under sequence parallelism: all-gather along dim 0 (X_q, s_x or X; again in backward)."""
        return t

    def start_gather_input(self, t: Tensor) -> AsyncTensor:
        """Begins `gather_input`."""
        gathered = self.gather_input(t)
        return lambda: gathered

    def reduce_accumulator(self, acc: Tensor) -> Tensor:
        """Row-parallel: the sum over ranks of fp32 acc [..., out]; its own tokens under sequence parallelism."""
        return acc

    def local_tokens(self, s_x: Tensor) -> Tensor:
        """Row-parallel under sequence parallelism: the slice along dim 0 that this rank keeps after reducing."""
        return s_x

    def gather_grad_output(self, dy: Tensor) -> Tensor:
        """Row-parallel under sequence parallelism: all-gather along dim 0."""
        return dy

    def reduce_grad_input(self, dx: Tensor) -> Tensor:
        """Column-parallel: the sum over ranks of dx [..., in]; its own tokens under sequence parallelism."""
        return dx

    def start_reduce_grad_input(self, dx: Tensor) -> AsyncTensor:
        """Begins `reduce_grad_input`."""
        reduced = self.reduce_grad_input(dx)
        return lambda: reduced
