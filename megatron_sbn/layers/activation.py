"""SiLU whose bits do not depend on where in a tensor a value stands.

`silu(x) = x / (1 + exp(-x))`. torch's own kernel computes the last elements of a row with other instructions than the
rest, so its result changes with the width of a tensor-parallel shard (docs/method.md, layout invariance); exp, and
division do not.
"""

import torch
from torch.autograd.function import FunctionCtx


class _Silu(torch.autograd.Function):
    """Saves x alone; `dsilu/dx = s + x s (1 - s)` with `s = 1 / (1 + exp(-x))`."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        x32 = x.float()
        return torch.div(x32, torch.exp(-x32).add_(1)).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        x32 = x.float()
        s = torch.exp(-x32).add_(1).reciprocal_()
        return (grad.float() * (s + x32 * s * (1 - s))).to(grad.dtype)


def silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU of every element, in fp32, returned in x's dtype."""
    return _Silu.apply(x)
