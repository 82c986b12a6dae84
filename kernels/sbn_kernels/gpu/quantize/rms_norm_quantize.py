"""RMSNorm and the rounding of its result to int8 in one pass: what precedes every column-parallel layer.

    rstd = 1 / sqrt(mean(x^2) + eps)      y = (x * rstd) * weight, rounded to x's type
    x_q, s_x = int8 of y per token        (activation_quantize)

(Zhang and Sennrich 2019, arXiv 1910.07467). y, which nothing else needs, never exists in memory: 2 bytes read and 1
written per bf16 element, in place of 7 in three kernels. Backward takes dy, the gradient of y straight through the
rounding, and x, and recomputes the rest:

    dx = rstd * (dy * weight - xhat * mean(dy * weight * xhat))           xhat = x * rstd
    dweight = sum over tokens of dy * xhat

dweight is summed by blocks of tokens into a table that is then added up in order: no atomics, the same bits each run.
A token's bits depend on no other token, so results do not change with how tokens are sharded over ranks.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.gpu.primitives.launch import check_device, row_block
from sbn_kernels.gpu.primitives.rounding import finite_abs, quantize_block
from sbn_kernels.gpu.primitives.tiles import round_to
from sbn_kernels.inspection import Build

_PARTIAL_SUMS = 512


@triton.jit
def rms_norm_quantize_kernel(x, weight, x_q, s_x, rstd, y, width, eps, BLOCK: tl.constexpr):
    """One token; y [tokens, width] is stored as well if it is given."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(values * values, axis=0), width.to(tl.float32))
    scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    gains = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normed = round_to(values * scale * gains, x.dtype.element_ty)
    if y is not None:
        tl.store(y + token * width + columns, normed, mask=inside)
    normed = normed.to(tl.float32)
    codes, s = quantize_block(normed, tl.max(finite_abs(normed), axis=0), -128.0, 127.0)
    tl.store(x_q + token * width + columns, codes, mask=inside)
    tl.store(s_x + token, s)
    tl.store(rstd + token, scale)


@triton.jit
def rms_norm_backward_kernel(dy, x, weight, rstd, dx, partial, tokens, width, BLOCK: tl.constexpr):
    """dx of every programs-th token from the program's number on, and their sum of dy * xhat."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gains = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for token in range(program, tokens, tl.num_programs(0)):
        at = tl.cast(token, tl.int64) * width + columns
        scale = tl.load(rstd + token)
        xhat = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        total += g * xhat
        g = g * gains
        mean = tl.sum(g * xhat, axis=0) / width.to(tl.float32)
        tl.store(dx + at, round_to(scale * (g - xhat * mean), dx.dtype.element_ty), mask=inside)
    tl.store(partial + program.to(tl.int64) * width + columns, total, mask=inside)


def _check(x: Tensor, weight: Tensor) -> None:
    check_device(x, weight)
    if x.dim() == 0 or x.shape[-1] == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"the norm's weight has shape {tuple(weight.shape)}, activations {tuple(x.shape)}: [hidden]")


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float = 1e-5, *, keep_output: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (x_q int8 [..., hidden], s_x fp32 [...], rstd fp32 [...], y or None).

    x_q and s_x have the bits of `reference.quantize_activations(y)`; y is within one unit in the last place of x's
    type of the exact norm.

    Args:
        x: fp32, bf16 or fp16 [..., hidden].
        weight: float [hidden].
        eps: under the root.
        keep_output: whether y [..., hidden], in x's type, is wanted as well.

    Raises:
        ValueError: shapes that do not fit, rows longer than `launch.LONGEST_ROW`, no CUDA tensors.
    """
    _check(x, weight)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    x_q = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    s_x, rstd = (torch.empty(len(rows), dtype=torch.float32, device=x.device) for _ in range(2))
    y = torch.empty_like(rows) if keep_output else None
    block, warps = row_block(rows.shape[1])
    if len(rows):
        rms_norm_quantize_kernel[(len(rows),)](
            rows, weight, x_q, s_x, rstd, y, rows.shape[1], eps, BLOCK=block, num_warps=warps
        )
    tokens = x.shape[:-1]
    return x_q.view(x.shape), s_x.view(tokens), rstd.view(tokens), None if y is None else y.view(x.shape)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dx [..., hidden] in x's type, dweight fp32 [hidden]).

    Args:
        dy: [..., hidden], the gradient of y.
        x, weight: as given to `rms_norm_quantize`; rstd fp32 [...], as it returned it.

    Raises:
        ValueError: shapes that do not fit, no CUDA tensors.
    """
    _check(x, weight)
    if dy.shape != x.shape or rstd.shape != x.shape[:-1]:
        raise ValueError(f"dy {tuple(dy.shape)} and rstd {tuple(rstd.shape)} do not go with x {tuple(x.shape)}")
    rows, grads = x.reshape(-1, x.shape[-1]).contiguous(), dy.reshape(-1, x.shape[-1]).contiguous()
    dx = torch.empty_like(rows)
    programs = min(len(rows), _PARTIAL_SUMS)
    partial = torch.zeros(programs, rows.shape[1], dtype=torch.float32, device=x.device)
    block, warps = row_block(rows.shape[1])
    if programs:
        rms_norm_backward_kernel[(programs,)](
            grads, rows, weight, rstd.reshape(-1), dx, partial, *rows.shape, BLOCK=block, num_warps=warps
        )
    return dx.view(x.shape), partial.sum(dim=0)


_SIGNATURE = {
    **dict.fromkeys(("x", "y", "dy", "dx", "weight"), "*bf16"),
    **dict.fromkeys(("s_x", "rstd", "partial"), "*fp32"),
    **{"x_q": "*i8", "tokens": "i32", "width": "i32", "eps": "fp32"},
}


def _build(name: str, function: object, width: int, **constexprs: object) -> Build:
    block, warps = row_block(width)
    values = {"BLOCK": block, **constexprs}
    return Build(f"rms_norm_quantize[{name} {width}]", function, _SIGNATURE, values, warps, aligned=("width",))


BUILDS: tuple[Build, ...] = tuple(
    build
    for width in (896, 2048, 3584, 8192)
    for build in (
        _build("forward", rms_norm_quantize_kernel, width, y=None),
        _build("backward", rms_norm_backward_kernel, width),
    )
)
"""Hidden sizes of Qwen2.5 0.5B, 3B, 7B and 72B."""
