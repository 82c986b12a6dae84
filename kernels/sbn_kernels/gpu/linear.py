"""The linear layer on CUDA: the registry's names put on the kernels of the other files.

forward    X_q, s_x -> Y            a form of the weights (forward_forms), scales in the product's kernel
dgrad      dY -> dX                 exact: transposed codes converted in registers (ternary_dgrad)
                                    int8: dY rounded per token (gradient_quantize), then the forward's product
wgrad      dY, X_q, s_x -> dW       exact: X_q converted in registers (ternary_wgrad)
                                    int8: dY rounded per row of out, int8 product
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sbn_kernels.gpu import forward_forms
from sbn_kernels.gpu.gemm import ternary_wgrad
from sbn_kernels.gpu.gemm.ternary_dgrad import ternary_dgrad
from sbn_kernels.gpu.gemm.ternary_gemm import ternary_linear as dense_linear
from sbn_kernels.gpu.primitives.launch import check_device
from sbn_kernels.gpu.primitives.transpose import transpose_int8
from sbn_kernels.gpu.quantize.gradient_quantize import quantize_gradient, quantize_gradient_columns


def int_matmul(
    x_q: Tensor, codes: Tensor, packed: Sequence[Tensor] = (), form: str = "dense", group: int = 0
) -> Tensor:
    """Return the integers x_q @ codes^T, fp32 [..., out]: see `reference.int_matmul` and `forward_forms`."""
    check_device(x_q, codes)
    return forward_forms.int_matmul(form, group, x_q, codes, packed)


def ternary_linear(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    packed: Sequence[Tensor] = (),
    form: str = "dense",
    group: int = 0,
) -> Tensor:
    """Return Y [..., out]: see `reference.ternary_linear` and `forward_forms`."""
    check_device(x_q, s_x, codes, gamma_per_row, bias)
    return forward_forms.linear(form, group, x_q, s_x, codes, packed, gamma_per_row, bias, out_dtype)


def input_gradient(
    dy: Tensor,
    codes: Tensor,
    gamma_per_row: Tensor,
    codes_t: Tensor | None = None,
    mode: str = "exact",
    bounds: Sequence[int] | None = None,
) -> Tensor:
    """Return dX [..., in] in dY's type: see `reference.input_gradient`, from which "exact" differs by rounding.

    Args:
        dy: [..., out]. codes: int8 [out, in]. gamma_per_row: fp32 [out].
        codes_t: the codes as int8 [in, out]; made on the spot if None.
        mode: "exact", "int8_dgrad" or "int8".
        bounds: where the runs of rows with one gamma begin, and out; None: any row may have its own.
    """
    check_device(dy, codes, gamma_per_row, codes_t)
    turned = transpose_int8(codes) if codes_t is None else codes_t
    if mode == "exact":
        return ternary_dgrad(dy, gamma_per_row, turned, _runs(bounds, dy.shape[-1]))
    g_q, s = quantize_gradient(dy, gamma_per_row)
    ones = torch.ones(turned.shape[0], dtype=torch.float32, device=dy.device)
    return dense_linear(g_q, s, turned, ones, None, dy.dtype)


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
