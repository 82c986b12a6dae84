"""Int8 activations on CUDA, one token a block of threads: read once, written once.

    a = max(max|x|, 1e-5)                 x_q = clip(rint(x * (127/a)), -128, 127)    s_x = a/127        8 bits
    r = sqrt(7) / max(mean|x|, 1e-5)      x_q = clip(rint(x * r), -8, 7)              s_x = 1/r          4 bits

x [tokens, in] in fp32, bf16 or fp16; x_q int8 and s_x fp32 have the bits of `reference.quantize_activations`. A token
is held in registers between its maximum and its rounding: 2 bytes read and 1 written per bf16 element, the least there
is. A row-parallel layer holds a slice of each token, so it asks for the maximum alone, reduces it over its ranks and
hands it back.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.gpu.primitives.launch import check_device, row_block
from sbn_kernels.gpu.primitives.rounding import (
    SCALE_FLOOR,
    exponent_above,
    finite_abs,
    fixed_point_terms,
    power_of_two,
    quantize_block,
    rint,
)
from sbn_kernels.inspection import Build

_SQRT7 = 7**0.5


@triton.jit
def quantize_kernel(x, x_q, s_x, abs_max, width, stride, BLOCK: tl.constexpr):
    """One token at 8 bits; `abs_max` [tokens] if given, else the token's own."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + token * stride + columns, mask=inside, other=0.0).to(tl.float32)
    a = tl.max(finite_abs(values), axis=0) if abs_max is None else tl.load(abs_max + token)
    codes, scale = quantize_block(values, a, -128.0, 127.0)
    tl.store(x_q + token * width + columns, codes, mask=inside)
    tl.store(s_x + token, scale)


@triton.jit
def abs_max_kernel(x, abs_max, width, stride, BLOCK: tl.constexpr):
    """max|x| of one token, NaN as +Inf."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + token * stride + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(abs_max + token, tl.max(finite_abs(values), axis=0))


@triton.jit
def quantize4_kernel(x, x_q, s_x, width, log_width, stride, root7, BLOCK: tl.constexpr):
    """One token at 4 bits; the mean is an exact sum in fixed point (`exact_sum.row_abs_mean`)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + token * stride + columns, mask=inside, other=0.0).to(tl.float32)
    a = tl.max(finite_abs(values), axis=0)
    good = a < float("inf")
    values = tl.where(good, values, 0.0)
    unit = exponent_above(tl.where(good, a, 0.0)) + log_width - 62
    total = tl.sum(fixed_point_terms(values, unit), axis=0)
    mean = (total.to(tl.float64) / width.to(tl.float64) * power_of_two(unit)).to(tl.float32)
    r = tl.div_rn(root7, tl.maximum(mean, SCALE_FLOOR))
    codes = tl.minimum(tl.maximum(rint(tl.minimum(tl.maximum(values * r, -1e4), 1e4)), -8.0), 7.0)
    tl.store(x_q + token * width + columns, codes.to(tl.int8), mask=inside)
    tl.store(s_x + token, tl.where(good, tl.div_rn(1.0, r), float("nan")))


def as_rows(x: Tensor) -> Tensor:
    """View (or copy) [..., in] as [tokens, in] with neighbouring elements of a token next to each other."""
    rows = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _check_activations(x: Tensor) -> None:
    check_device(x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"activations must be [..., in] with in >= 1, got shape {tuple(x.shape)}")


def activation_abs_max(x: Tensor) -> Tensor:
    """Return max|x| over the last dimension, fp32 [...], NaN as +Inf: `reference.activation_abs_max`.

    Raises:
        ValueError: the last dimension is empty, or longer than `launch.LONGEST_ROW`; no CUDA tensor.
    """
    _check_activations(x)
    rows = as_rows(x)
    abs_max = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    block, warps = row_block(rows.shape[1])
    if len(rows):
        abs_max_kernel[(len(rows),)](rows, abs_max, rows.shape[1], rows.stride(0), BLOCK=block, num_warps=warps)
    return abs_max.view(x.shape[:-1])


def quantize_activations(x: Tensor, bits: int = 8, *, abs_max: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (x_q int8 [..., in], s_x fp32 [...]): the bits of `reference.quantize_activations`.

    Args:
        x: fp32, bf16 or fp16 [..., in].
        bits: 8 or 4.
        abs_max: fp32 [...], the maximum over the full input dimension where x holds a slice of it; 8 bits only.

    Raises:
        ValueError: other `bits`, `abs_max` with 4 bits or of a wrong shape, an empty or too long last dimension, no
            CUDA tensor.
    """
    _check_activations(x)
    if bits not in (8, 4):
        raise ValueError(f"activation bits must be 8 or 4, got {bits}")
    if bits == 4 and abs_max is not None:
        raise ValueError("abs_max goes with 8 bits: 4-bit activations are scaled by their mean, and never split")
    if abs_max is not None and abs_max.shape != x.shape[:-1]:
        raise ValueError(
            f"abs_max has shape {tuple(abs_max.shape)}, expected {tuple(x.shape[:-1])}, one value per token"
        )
    rows = as_rows(x)
    x_q = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    s_x = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    width = rows.shape[1]
    block, warps = row_block(width)
    if len(rows) and bits == 8:
        given = None if abs_max is None else abs_max.float().contiguous()
        quantize_kernel[(len(rows),)](rows, x_q, s_x, given, width, rows.stride(0), BLOCK=block, num_warps=warps)
    elif len(rows):
        log_width = (width - 1).bit_length()
        quantize4_kernel[(len(rows),)](
            rows, x_q, s_x, width, log_width, rows.stride(0), _SQRT7, BLOCK=block, num_warps=warps
        )
    return x_q.view(x.shape), s_x.view(x.shape[:-1])


_ROW = {"width": "i32", "stride": "i32", "log_width": "i32", "root7": "fp32"}
_TENSORS = {"x": "*bf16", "x_q": "*i8", "s_x": "*fp32", "abs_max": "*fp32"}


def _build(name: str, function: object, width: int, **constexprs: object) -> Build:
    block, warps = row_block(width)
    return Build(
        f"activation_quantize[{name} {width}]",
        function,
        _TENSORS | _ROW,
        {"BLOCK": block, **constexprs},
        warps,
        aligned=("width", "stride"),
    )


BUILDS: tuple[Build, ...] = (
    *(
        build
        for width in (896, 4864, 11008, 18944)
        for build in (
            _build("own maximum", quantize_kernel, width, abs_max=None),
            _build("given maximum", quantize_kernel, width),
            _build("maximum", abs_max_kernel, width),
        )
    ),
    *(_build("4 bits", quantize4_kernel, width) for width in (896, 2048, 3584, 8192)),
)
"""Rows of Qwen2.5's layers: hidden 896 to 8192, which alone may have 4 bits, and ffn 4864, 11008 and 18944."""
