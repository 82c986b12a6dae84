"""The linear layer on CUDA: the registry's names put on the kernels of the other files.

forward    X_q, s_x -> Y            a form of the weight (forward_forms), scales in the GEMM's kernel
dgrad      dY -> dX                 exact: transposed codes converted in registers (ternary_dgrad)
                                    int8: dY quantized per token (gradient_quantize), then the forward's GEMM
wgrad      dY, X_q, s_x -> dW       exact: X_q converted in registers (ternary_wgrad)
                                    int8: dY quantized per row of out, int8 GEMM
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sbn_kernels.gpu.forward_forms import find_form
from sbn_kernels.gpu.gemm import ternary_wgrad
from sbn_kernels.gpu.gemm.ternary_dgrad import ternary_dgrad
from sbn_kernels.gpu.gemm.ternary_gemm import ternary_linear as dense_linear
from sbn_kernels.gpu.primitives.launch import check_device
from sbn_kernels.gpu.primitives.transpose import transpose_int8
from sbn_kernels.gpu.quantize.gradient_quantize import quantize_gradient, quantize_gradient_columns
from sbn_kernels.ternary_weight import TernaryWeight


def int_matmul(x_q: Tensor, weight: TernaryWeight) -> Tensor:
    """Return the integers x_q @ codes^T, fp32 [..., out]: see `reference.int_matmul` and `forward_forms`."""
    check_device(x_q, weight.codes)
    return find_form(weight.form).int_matmul(x_q, weight)


def ternary_linear(
    x_q: Tensor,
    s_x: Tensor,
    weight: TernaryWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return Y [..., out]: see `reference.ternary_linear` and `forward_forms`."""
    check_device(x_q, s_x, weight.codes, weight.gamma_per_row, bias)
    return find_form(weight.form).linear(x_q, s_x, weight, bias, out_dtype)


def input_gradient(dy: Tensor, weight: TernaryWeight, mode: str = "exact") -> Tensor:
    """Return dX [..., in] in dY's type: see `reference.input_gradient`, from which "exact" differs by rounding.

    Args:
        dy: [..., out].
        weight: its codes are transposed here if it does not bring them so.
        mode: "exact", "int8_dgrad" or "int8".
    """
    gamma = weight.gamma_per_row
    check_device(dy, weight.codes, gamma, weight.codes_t)
    codes_t = transpose_int8(weight.codes) if weight.codes_t is None else weight.codes_t  # [in, out]
    if mode == "exact":
        return ternary_dgrad(dy, gamma, codes_t, _runs(weight.bounds, dy.shape[-1]))
    g_q, s = quantize_gradient(dy, gamma)  # int8 [..., out], fp32 [...]
    ones = torch.ones(codes_t.shape[0], dtype=torch.float32, device=dy.device)
    return dense_linear(g_q, s, codes_t, ones, None, dy.dtype)


def _runs(bounds: Sequence[int] | None, rows: int) -> tuple[tuple[int, int, int], ...]:
    """(start, length, number) of the runs between `bounds`; rows of one run each if there are none."""
    if bounds is None:
        bounds = range(rows + 1)
    return tuple((start, end - start, i) for i, (start, end) in enumerate(pairwise(bounds)))


def weight_gradient(dy: Tensor, x_q: Tensor, s_x: Tensor, mode: str = "exact") -> Tensor:
    """Return dW fp32 [out, in]: see `reference.weight_gradient`, from which "exact" differs by rounding."""
    check_device(dy, x_q, s_x)
    if mode != "int8":
        return ternary_wgrad.weight_gradient(dy, s_x, x_q)
    h_q, s = quantize_gradient_columns(dy, s_x)
    return ternary_wgrad.weight_gradient_int8(h_q, s, x_q.reshape(-1, x_q.shape[-1]).contiguous())
