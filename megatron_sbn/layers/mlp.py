"""Megatron-Core's gated MLP, with silu(gate) * up inside the down projection where a kernel does both."""

from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_sbn.producers import SwiGlu


class GatedMlp(MLP):
    """FC1, SwiGLU, FC2. Shapes: [tokens, batch, hidden] in and out, as Megatron-Core's."""

    def forward(self, hidden_states: Tensor, **rest: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
        """(output, bias where the caller adds it, else None)."""
        if not self.linear_fc2.fuses_producer:
            output: tuple[Tensor, Tensor | None] = super().forward(hidden_states, **rest)
            return output
        gate_up, _ = self.linear_fc1(hidden_states)
        fused: tuple[Tensor, Tensor | None] = self.linear_fc2(gate_up, producer=SwiGlu())
        return fused


def fuse_swiglu(mlp: MLP) -> None:
    """Makes a built MLP a `GatedMlp`: Megatron-Core hands its process group to MLP alone, to no subclass of it."""
    mlp.__class__ = GatedMlp
