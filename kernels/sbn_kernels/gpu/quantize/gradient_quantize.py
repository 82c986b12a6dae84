"""Gradients quantized to int8 on CUDA, for the int8 modes of the backward pass (reference.quantize_rows).

    for dX    G = dY * gamma[row]     G_q, s per token over the rows of out      [tokens, out], as dY lies
    for dW    H = dY * s_x[token]     H_q, s per row of out over the tokens      [out, tokens], transposed for the GEMM

    t_q = clip(rint(t * (127/a)), -127, 127)    s = a/127    a = max(max|t|, 1e-30)

The floor is far below that of activations, since gradients are legitimately tiny. G's maximum is that of a row that a
block of threads holds. H's is that of a column: one kernel takes maxima of tiles, put together by atomics (exact in any
order), another quantizes and transposes the tiles. A row with NaN or Inf gives codes 0 and a scale of NaN.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.gpu.primitives.launch import check_device, row_block
from sbn_kernels.gpu.primitives.rounding import finite_abs, rint
from sbn_kernels.gpu.quantize.activation_quantize import as_rows
from sbn_kernels.inspection import Build

_ROW_FLOOR = tl.constexpr(1e-30)
_TILE = 64


@triton.jit
def _round(t, a):
    """(int8 codes, s) of fp32 t with maxima a that broadcast against it."""
    good = a < float("inf")
    floored = tl.maximum(tl.where(good, a, 1.0), _ROW_FLOOR)
    r = tl.div_rn(tl.full(floored.shape, 127.0, tl.float32), floored)
    s = tl.div_rn(floored, tl.full(floored.shape, 127.0, tl.float32))
    clean = tl.where(good, tl.where(t == t, t, 0.0), 0.0)
    codes = tl.minimum(tl.maximum(rint(clean * r), -127.0), 127.0).to(tl.int8)
    return codes, tl.where(good, s, float("nan"))


@triton.jit
def gradient_quantize_kernel(dy, gamma, g_q, s, width, stride, BLOCK: tl.constexpr):
    """One row of G = dY * gamma[column]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    g = tl.load(dy + token * stride + columns, mask=inside, other=0.0).to(tl.float32)
    g = g * tl.load(gamma + columns, mask=inside, other=0.0)
    codes, scale = _round(g, tl.max(finite_abs(g), axis=0))
    tl.store(g_q + token * width + columns, codes, mask=inside)
    tl.store(s + token, scale)


@triton.jit
def _scaled_tile(dy, s_x, tokens, width, TILE: tl.constexpr):
    """(H of one tile [TILE, TILE], its tokens, its columns)."""
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (rows < tokens)[:, None] & (columns < width)[None, :]
    values = tl.load(dy + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=inside, other=0.0)
    scales = tl.load(s_x + rows, mask=rows < tokens, other=0.0)
    return tl.where(inside, values.to(tl.float32) * scales[:, None], 0.0), rows, columns


@triton.jit
def column_max_kernel(dy, s_x, maxima, tokens, width, TILE: tl.constexpr):
    """max|H| of the columns of one tile; bit patterns of floats >= 0 are in the order of the floats."""
    h, _, columns = _scaled_tile(dy, s_x, tokens, width, TILE)
    bits = tl.max(finite_abs(h).to(tl.int32, bitcast=True), axis=0)
    tl.atomic_max(maxima + columns, bits, mask=columns < width)


@triton.jit
def transposed_quantize_kernel(dy, s_x, maxima, h_q, s, tokens, width, TILE: tl.constexpr):
    """H_q [width, tokens] of one tile, and s [width]."""
    h, rows, columns = _scaled_tile(dy, s_x, tokens, width, TILE)
    a = tl.load(maxima + columns, mask=columns < width, other=0.0)
    codes, scale = _round(h, a[None, :])
    inside = (columns < width)[:, None] & (rows < tokens)[None, :]
    tl.store(h_q + columns.to(tl.int64)[:, None] * tokens + rows[None, :], tl.trans(codes), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(s + columns, tl.reshape(scale, (TILE,)), mask=columns < width)


def quantize_gradient(dy: Tensor, gamma_per_row: Tensor) -> tuple[Tensor, Tensor]:
    """Return (g_q int8 [..., out] in [-127, 127], s fp32 [...]): `reference.quantize_rows(dy * gamma_per_row)`.

    Args:
        dy: float [..., out].
        gamma_per_row: fp32 [out].

    Raises:
        ValueError: shapes that do not fit, rows that are too long, no CUDA tensor.
    """
    check_device(dy, gamma_per_row)
    if gamma_per_row.shape != dy.shape[-1:]:
        raise ValueError(f"gamma_per_row has shape {tuple(gamma_per_row.shape)}, expected ({dy.shape[-1]},)")
    rows = as_rows(dy)
    g_q = torch.empty(rows.shape, dtype=torch.int8, device=dy.device)
    s = torch.empty(len(rows), dtype=torch.float32, device=dy.device)
    block, warps = row_block(rows.shape[1])
    if len(rows):
        gradient_quantize_kernel[(len(rows),)](
            rows, gamma_per_row.contiguous(), g_q, s, rows.shape[1], rows.stride(0), BLOCK=block, num_warps=warps
        )
    return g_q.view(dy.shape), s.view(dy.shape[:-1])


def quantize_gradient_columns(dy: Tensor, s_x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (h_q int8 [out, tokens] in [-127, 127], s fp32 [out]): `reference.quantize_rows((dy * s_x).t())`.

    Args:
        dy: float [..., out].
        s_x: fp32 [...], one per token.

    Raises:
        ValueError: shapes that do not fit, no CUDA tensors.
    """
    check_device(dy, s_x)
    if s_x.shape != dy.shape[:-1]:
        raise ValueError(f"s_x has shape {tuple(s_x.shape)}, expected {tuple(dy.shape[:-1])}: one value per token")
    rows = as_rows(dy).contiguous()
    tokens, width = rows.shape
    maxima = torch.zeros(width, dtype=torch.int32, device=dy.device)
    h_q = torch.empty(width, tokens, dtype=torch.int8, device=dy.device)
    s = torch.empty(width, dtype=torch.float32, device=dy.device)
    if tokens:
        grid = (triton.cdiv(tokens, _TILE), triton.cdiv(width, _TILE))
        scales = s_x.reshape(-1).contiguous()
        column_max_kernel[grid](rows, scales, maxima, tokens, width, TILE=_TILE, num_warps=8)
        transposed_quantize_kernel[grid](
            rows, scales, maxima.view(torch.float32), h_q, s, tokens, width, TILE=_TILE, num_warps=8
        )
    return h_q, s


_SIGNATURE = {
    **{"dy": "*bf16", "gamma": "*fp32", "g_q": "*i8", "s": "*fp32", "s_x": "*fp32", "h_q": "*i8"},
    **{"width": "i32", "stride": "i32", "tokens": "i32"},
}


def _row_build(width: int) -> Build:
    block, warps = row_block(width)
    name = f"gradient_quantize[rows {width}]"
    return Build(name, gradient_quantize_kernel, _SIGNATURE, {"BLOCK": block}, warps, aligned=("width", "stride"))


def _column_build(name: str, function: object, maxima: str) -> Build:
    return Build(name, function, _SIGNATURE | {"maxima": maxima}, {"TILE": _TILE}, 8, aligned=("width", "tokens"))


BUILDS: tuple[Build, ...] = (
    *(_row_build(width) for width in (896, 4864, 11008, 18944)),
    _column_build("gradient_quantize[column maxima]", column_max_kernel, "*i32"),
    _column_build("gradient_quantize[columns]", transposed_quantize_kernel, "*fp32"),
)
