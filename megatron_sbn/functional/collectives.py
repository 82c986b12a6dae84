"""How tokens lie over the ranks of one layer: the only way in which tensors of its forward and backward cross ranks."""

from collections.abc import Callable

from torch import Tensor

Pending = Callable[[], Tensor]
"""A tensor that is on its way: calling it waits for the collective."""


class LocalCollectives:
    """How tokens and features of one layer lie over the tensor-parallel ranks. This one: all on a single device.

    A subclass overrides what its layout needs; tensors cross ranks here and nowhere else. `start_` methods begin what
    the method without it does, so that products are computed meanwhile; their argument is not touched until the wait.

    Attributes:
        splits_input: whether X holds a slice of `in` (row-parallel), so that products are partial sums.
    """

    splits_input: bool = False

    def token_abs_max(self, a: Tensor) -> Tensor:
        """Row-parallel: the maximum over ranks of a [tokens...], in forward."""
        return a

    def gather_input(self, t: Tensor) -> Tensor:
        """Column-parallel under sequence parallelism: all-gather along dim 0 (X_q, s_x or X; again in backward)."""
        return t

    def start_gather_input(self, t: Tensor) -> Pending:
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

    def start_reduce_grad_input(self, dx: Tensor) -> Pending:
        """Begins `reduce_grad_input`."""
        reduced = self.reduce_grad_input(dx)
        return lambda: reduced
