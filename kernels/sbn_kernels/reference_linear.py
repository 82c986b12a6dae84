"""The reference as a backend: `reference`'s plain arguments taken from a `TernaryWeight`."""

import torch
from torch import Tensor

from sbn_kernels import reference
from sbn_kernels.ternary_weight import TernaryWeight


def int_matmul(x_q: Tensor, weight: TernaryWeight) -> Tensor:
    """Return x_q @ codes^T, fp32 [..., out]: see `reference.int_matmul`."""
    return reference.int_matmul(x_q, weight.codes)


def ternary_linear(
    x_q: Tensor,
    s_x: Tensor,
    weight: TernaryWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return Y [..., out]: see `reference.ternary_linear`."""
    return reference.ternary_linear(x_q, s_x, weight.codes, weight.gamma_per_row, bias, out_dtype)


def input_gradient(dy: Tensor, weight: TernaryWeight, mode: str = "exact") -> Tensor:
    """Return dX [..., in]: see `reference.input_gradient`."""
    return reference.input_gradient(dy, weight.codes, weight.gamma_per_row, weight.codes_t, mode)
