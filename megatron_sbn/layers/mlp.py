"""Megatron-Core's gated MLP, with silu(gate) * up inside the down projection where a kernel does both.

`silu(x) = x / (1 + exp(-x))` here has bits that do not depend on where in a tensor a value stands. torch's own kernel
computes the last elements of a row with other instructions than the rest, so its result changes with the width of a
tensor-parallel shard (docs/method.md, "Forward"); exp and division do not.
"""

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron_sbn.functional.input_quantizers import SwigluQuantizer


class GatedMlp(MLP):
    """FC1, SwiGLU, FC2. Shapes: [tokens, batch, hidden] in and out, as Megatron-Core's."""

    def forward(self, hidden_states: Tensor, **rest: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
        """(output, bias where the caller adds it, else None)."""
        if not self.linear_fc2.fuses_input:
            output: tuple[Tensor, Tensor | None] = super().forward(hidden_states, **rest)
            return output
        gate_up, _ = self.linear_fc1(hidden_states)
        fused: tuple[Tensor, Tensor | None] = self.linear_fc2(gate_up, quantizer=SwigluQuantizer())
        return fused


def fuse_swiglu(mlp: MLP) -> None:
    """Makes a built MLP a `GatedMlp`: Megatron-Core hands its process group to MLP alone, to no subclass of it."""
    mlp.__class__ = GatedMlp


class _Silu(torch.autograd.Function):
    """Saves x alone; `dsilu/dx = s + x s (1 - s)` with `s = 1 / (1 + exp(-x))`."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        x32 = x.float()
        return torch.div(x32, torch.exp(-x32).add_(1)).to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        x32 = x.float()
        s = torch.exp(-x32).add_(1).reciprocal_()
        return (grad.float() * (s + x32 * s * (1 - s))).to(grad.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU of every element, in fp32, returned in x's dtype."""
    return _Silu.apply(x)
