"""RMSNorm, computed in fp32 and returned in the input's dtype.

`y = x / sqrt(mean(x^2) + eps) * weight` over the hidden dimension (Zhang and Sennrich 2019, arXiv 1910.07467).
Megatron-Core's own torch norm refuses sequence parallelism, where each rank sees a part of the tokens and the weight's
gradient must be summed over the tensor-parallel group: the attribute `sequence_parallel` asks for that sum
(parallel/gradient_sync.py).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class RMSNorm(nn.Module):
    """Root-mean-square norm, built as Megatron-Core builds its norms.

    Shapes: [tokens, batch, hidden] in and out; weight [hidden].
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.fused: Callable[[], bool] | None = None  # whether the layer after this one does the norm itself

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden] in x's dtype; x itself where the layer after it does the norm."""
        if self.fused is not None and self.fused():
            return x
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
