"""Weights of three layers, for kernels that take many at once: what is awkward about weights is among them."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def three_layers(dtype: torch.dtype) -> list[Tensor]:
    """[70, 96], [3, 480] and [1, 96], with ties, a row of zeros and a subnormal; 3 and 32 divide their widths."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(s, generator=generator) * 0.02 for s in ((70, 96), (3, 480), (1, 96))]
    made[0][0, :8], made[0][1], made[0][2, 5] = 0.5, 0.0, 2.0**-149
    return [w.to(dtype).to(DEVICE) for w in made]
