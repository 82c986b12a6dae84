"""Gradient of a ternary linear layer's latent weights, from the int8 activations that forward saved.

    dW[o, i] = sum_t dY[t, o] * (s_x[t] * X_q[t, i])        fp32 sums in a fixed order, fp32 result

Dense: no mask on it, so that pruned weights keep learning. X_q tiles are converted in the kernel, scaled in fp32 and
rounded to dY's type; no floating activation is ever in memory, and dY goes to shared memory untouched. A result of few
tiles leaves processors idle: the tokens are then split into slices, each summed into its own fp32 matrix, which a
second kernel adds up in order. No atomics: the same tile gives the same bits every time.

On sm_90 that kernel waits for every wgmma, since its scaled tile goes from registers to shared memory, which the
next step overwrites. A transposed tile computes dW^T = (X_q * s_x)^T @ dY from X_q^T [in, tokens]: the scaled tile is
then wgmma's A, which may stay in registers, and several stay in flight. Its measured time includes transposing.

Error of a value, with S = sum_t |dY * s_x * X_q| and u the unit roundoff of dY's type (2^-8 bf16, 2^-11 fp16, 2^-24
fp32; fp16 adds 2^-25 |dY| a token, its smallest numbers):

    |error| <= u S + (tokens + 2) 2^-24 S                  and 2^-24 |dW| where it is added to what is there

The int8 form takes dY * s_x quantized per output row over the tokens, (h_q, s), transposed: then

    dW[o, i] = float(sum_t h_q[o, t] * X_q[t, i]) * s[o]   exact int32 sums

is the forward's int8 GEMM on X_q^T [in, tokens], which `transpose_int8` makes. 127 * 128 * 131072 < 2^31, so tokens go
in slices of 131072, whose scaled sums are added in fp32, in order.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.gpu.gemm.ternary_gemm import int8_gemm
from sbn_kernels.gpu.primitives.tiles import FAMILIES, Tile, dot_floats, gpu_family, grouped_tile, round_to
from sbn_kernels.gpu.primitives.transpose import transpose_int8
from sbn_kernels.inspection import FLOAT16_MMA, Build
from sbn_kernels.reference import MAX_REDUCTION
from sbn_kernels.tuning import bucket_tokens, pick_tile


@triton.jit
def store_block(y, out, row, column, m, n, ADD: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Store, or add, a block [M, N] to out [m, n], beginning at (row, column)."""
    # Offsets inside a block fit 32 bits, which saves registers; where it begins may not.
    begin = out + tl.cast(row, tl.int64) * n
    rows = tl.arange(0, M)
    columns = column + tl.arange(0, N)
    inside = (rows < m - row)[:, None] & (columns < n)[None, :]
    pointers = begin + (rows[:, None] * n + columns[None, :])
    if ADD:
        y = tl.load(pointers, mask=inside, other=0.0) + y
    tl.store(pointers, y, mask=inside)


@triton.jit
def store_parts(
    acc,
    out,
    row,
    column,
    m,
    n,
    ADD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PART: tl.constexpr,
):
    """Store sums [M, N], or their transpose; at most PART columns of them fit the registers beside an output block."""
    if N > PART:
        left, right = tl.split(tl.permute(tl.reshape(acc, (M, 2, N // 2)), (0, 2, 1)))
        store_parts(left, out, row, column, m, n, ADD, TRANSPOSED, M, N // 2, PART)
        store_parts(right, out, row, column + N // 2, m, n, ADD, TRANSPOSED, M, N // 2, PART)
    elif TRANSPOSED:
        store_block(tl.trans(acc), out, column, row, m, n, ADD, N, M)
    else:
        store_block(acc, out, row, column, m, n, ADD, M, N)


@triton.jit(do_not_specialize=["tokens", "slice_steps"])
def weight_gradient_kernel(
    dy,
    s_x,
    x_q,
    out,
    m,
    n,
    tokens,
    slice_steps,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[slice, m, n] of dy [tokens, m], s_x [tokens] and x_q [tokens, n]; EVEN: no tile has an edge inside."""
    row, column = grouped_tile(tl.program_id(0), tl.cdiv(m, M), tl.cdiv(n, N), GROUP)
    piece = tl.program_id(1).to(tl.int64)
    first = piece * slice_steps * K
    count = tl.minimum(slice_steps * K, tokens - first).to(tl.int32)
    rows = row * M + tl.arange(0, M)
    columns = column * N + tl.arange(0, N)
    inner = tl.arange(0, K)
    dtype: tl.constexpr = dy.dtype.element_ty
    dy_at = dy + (first + inner)[None, :] * m + rows[:, None]  # [M, K]
    x_at = x_q + (first + inner)[:, None] * n + columns[None, :]  # [K, N]
    s_at = s_x + first + inner
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, count, K):
        inside = inner < count - start
        if EVEN:
            g = tl.load(dy_at)
            x = tl.load(x_at)
            s = tl.load(s_at)
        else:
            g = tl.load(dy_at, mask=inside[None, :] & (rows < m)[:, None], other=0.0)
            x = tl.load(x_at, mask=inside[:, None] & (columns < n)[None, :], other=0)
            s = tl.load(s_at, mask=inside, other=0.0)
        scaled = round_to(x.to(tl.float32) * s[:, None], dtype)
        acc = dot_floats(g, scaled, acc)
        dy_at += tl.cast(m, tl.int64) * K
        x_at += tl.cast(n, tl.int64) * K
        s_at += K
    store_parts(acc, out + piece * m * n, row * M, column * N, m, n, ADD, False, M, N, N // 2)


@triton.jit(do_not_specialize=["tokens", "slice_steps"])
def transposed_gradient_kernel(
    dy,
    s_x,
    x_q_t,
    out,
    m,
    n,
    tokens,
    slice_steps,
    stride,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`weight_gradient_kernel` of x_q_t [n, stride], which has zeros from `tokens`; tiles are [M of n, N of m]."""
    row, column = grouped_tile(tl.program_id(0), tl.cdiv(n, M), tl.cdiv(m, N), GROUP)
    piece = tl.program_id(1).to(tl.int64)
    first = piece * slice_steps * K
    count = tl.minimum(slice_steps * K, tokens - first).to(tl.int32)
    rows = row * M + tl.arange(0, M)
    columns = column * N + tl.arange(0, N)
    inner = tl.arange(0, K)
    dtype: tl.constexpr = dy.dtype.element_ty
    # Rows past the end read row 0 instead of being masked, and are not stored.
    x_rows = tl.where(rows < n, rows, 0).to(tl.int64)
    x_at = x_q_t + x_rows[:, None] * stride + (first + inner)[None, :]  # [M, K]
    dy_at = dy + (first + inner)[:, None] * m + columns[None, :]  # [K, N]
    s_at = s_x + first + inner
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, count, K):
        inside = inner < count - start
        x = tl.load(x_at)
        if EVEN:
            g = tl.load(dy_at)
            s = tl.load(s_at)
        else:
            g = tl.load(dy_at, mask=inside[:, None] & (columns < m)[None, :], other=0.0)
            s = tl.load(s_at, mask=inside, other=0.0)
        scaled = round_to(x.to(tl.float32) * s[None, :], dtype)
        acc = dot_floats(scaled, g, acc)
        x_at += K
        dy_at += tl.cast(m, tl.int64) * K
        s_at += K
    store_parts(acc, out + piece * m * n, row * M, column * N, m, n, ADD, True, M, N, 64)


@triton.jit
def add_slices_kernel(slices, out, size, COUNT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """out[size] (+)= slices[0] + slices[1] + ..., in this order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(slices + at, mask=inside, other=0.0)
    for piece in tl.static_range(1, COUNT):
        total += tl.load(slices + size * piece + at, mask=inside, other=0.0)
    if ADD:
        total = tl.load(out + at, mask=inside, other=0.0) + total
    tl.store(out + at, total, mask=inside)


GRADIENT_TILES: Mapping[str, tuple[Tile, ...]] = MappingProxyType(
    {
        "interpreted": (Tile(32, 64, 32, warps=4),),
        "ampere": (
            Tile(128, 128, 32, stages=3),
            Tile(64, 64, 64, warps=4),
            Tile(64, 64, 64, warps=4, slices=4),
            Tile(128, 128, 32, stages=3, transposed=True),
        ),
        "hopper": (
            Tile(128, 256, 64, stages=3),
            Tile(128, 256, 64, stages=4),
            Tile(256, 128, 64, stages=3),
            Tile(128, 128, 64, stages=4),
            Tile(128, 128, 64, warps=4, stages=3),
            Tile(128, 128, 64, stages=4, slices=2),
            Tile(128, 128, 64, stages=4, slices=4),
            Tile(128, 128, 64, stages=4, slices=8),
            Tile(128, 256, 64, stages=3, transposed=True),
            Tile(128, 256, 64, stages=4, transposed=True),
            Tile(128, 128, 64, stages=4, transposed=True),
            Tile(128, 128, 64, warps=4, stages=3, transposed=True),
            Tile(128, 128, 64, stages=4, slices=4, transposed=True),
        ),
        "blackwell": (
            Tile(128, 256, 64, stages=3),
            Tile(128, 128, 64, stages=4),
            Tile(128, 128, 64, stages=4, slices=4),
            Tile(128, 256, 64, stages=3, transposed=True),
            Tile(128, 128, 64, stages=4, transposed=True),
        ),
        "blackwell_small": (
            Tile(128, 128, 32, stages=3),
            Tile(64, 64, 32, warps=4),
            Tile(64, 64, 32, warps=4, slices=4),
            Tile(128, 128, 32, stages=3, transposed=True),
        ),
    }
)
"""Tiles worth measuring for bf16 and fp16: m output features, n input features (transposed: the reverse), k tokens."""

_FP32 = Tile(64, 64, 32, warps=4, stages=2)
_ADD_BLOCK = 1024


def _launch(tile: Tile, dy: Tensor, s_x: Tensor, x_q: Tensor, out: Tensor, *, add: bool) -> None:
    """Run the kernel on matrices, and the sum of slices after it."""
    (tokens, m), n = dy.shape, x_q.shape[1]
    sliced = tile.slices > 1
    target = out.new_empty(tile.slices, m, n) if sliced else out
    options: dict[str, Any] = {"M": tile.m, "N": tile.n, "K": tile.k, "GROUP": tile.group}
    options |= {"ADD": add and not sliced, "num_warps": tile.warps, "num_stages": tile.stages}
    slice_steps = triton.cdiv(triton.cdiv(tokens, tile.k), tile.slices)
    whole_steps = tokens % tile.k == 0
    if tile.transposed:
        x_q_t = transpose_int8(x_q, multiple=tile.k)
        grid = (triton.cdiv(n, tile.m) * triton.cdiv(m, tile.n), tile.slices)
        sizes = (m, n, tokens, slice_steps, x_q_t.shape[1])
        even = whole_steps and m % tile.n == 0
        transposed_gradient_kernel[grid](dy, s_x, x_q_t, target, *sizes, EVEN=even, **options)
    else:
        grid = (triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n), tile.slices)
        even = whole_steps and m % tile.m == 0 and n % tile.n == 0
        weight_gradient_kernel[grid](dy, s_x, x_q, target, m, n, tokens, slice_steps, EVEN=even, **options)
    if sliced:
        add_slices_kernel[(triton.cdiv(m * n, _ADD_BLOCK),)](
            target, out, m * n, COUNT=tile.slices, ADD=add, BLOCK=_ADD_BLOCK
        )


def weight_gradient(
    dy: Tensor,
    s_x: Tensor,
    x_q: Tensor,
    accumulate_into: Tensor | None = None,
    *,
    config: Tile | None = None,
) -> Tensor:
    """Return dW fp32 [out, in] (see the module), or `accumulate_into` after adding it there.

    Args:
        dy: bf16, fp16 or fp32 [..., out].
        s_x: fp32 [...], one per token. x_q: int8 [..., in].
        accumulate_into: fp32 [out, in], contiguous.
        config: forces a tile; its `slices` split the tokens.

    Raises:
        ValueError: types or shapes that do not go together.
    """
    if dy.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dy must be fp32, bf16 or fp16, got {dy.dtype}")
    if x_q.dtype != torch.int8 or x_q.shape[:-1] != dy.shape[:-1]:
        raise ValueError(f"dy {tuple(dy.shape)} takes x_q int8 of the same tokens, got {x_q.dtype} {tuple(x_q.shape)}")
    if s_x.dtype != torch.float32 or s_x.shape != dy.shape[:-1]:
        raise ValueError(f"s_x must be fp32 {tuple(dy.shape[:-1])}, got {s_x.dtype} {tuple(s_x.shape)}")
    m, n = dy.shape[-1], x_q.shape[-1]
    out = _result(dy, m, n, accumulate_into)
    gradient, codes, scale = dy.reshape(-1, m).contiguous(), x_q.reshape(-1, n).contiguous(), s_x.flatten().contiguous()
    family = gpu_family(dy.device)
    tiles = (_FP32,) if dy.dtype == torch.float32 and family != "interpreted" else GRADIENT_TILES[family]
    key: dict[str, int | str] = {"tokens": bucket_tokens(codes.shape[0]), "out": m, "in": n, "dtype": str(dy.dtype)}

    def measured(tile: Tile) -> None:
        # On a scratch result: `out` may be one that is added to.
        _launch(tile, gradient, scale, codes, torch.empty_like(out), add=False)

    tile = pick_tile("weight_gradient", key, tiles, measured, device=dy.device, config=config)
    _launch(tile, gradient, scale, codes, out, add=accumulate_into is not None)
    return out


def _result(like: Tensor, m: int, n: int, accumulate_into: Tensor | None) -> Tensor:
    """The fp32 [m, n] that is written to."""
    if accumulate_into is None:
        return torch.empty(m, n, dtype=torch.float32, device=like.device)
    if accumulate_into.dtype != torch.float32 or accumulate_into.shape != (m, n) or not accumulate_into.is_contiguous():
        raise ValueError(
            f"accumulate_into must be contiguous fp32 ({m}, {n}), "
            f"got {accumulate_into.dtype} {tuple(accumulate_into.shape)} of strides {accumulate_into.stride()}"
        )
    return accumulate_into


def weight_gradient_int8(
    h_q_t: Tensor,
    scale: Tensor,
    x_q: Tensor,
    accumulate_into: Tensor | None = None,
    *,
    config: Tile | None = None,
    slice_tokens: int = MAX_REDUCTION,
) -> Tensor:
    """Return dW fp32 [out, in] = (h_q_t @ x_q) * scale, or `accumulate_into` after adding it there.

    Args:
        h_q_t: int8 [out, tokens] in [-127, 127]: dY * s_x, quantized per row. scale: fp32 [out], of those rows.
        x_q: int8 [tokens, in].
        accumulate_into: fp32 [out, in], contiguous.
        config: forces a tile of `ternary_gemm`.
        slice_tokens: longest exact sum, at most 131072.

    Raises:
        ValueError: types or shapes that do not go together.
    """
    m, tokens = h_q_t.shape
    if x_q.dim() != 2 or x_q.shape[0] != tokens or scale.shape != (m,) or scale.dtype != torch.float32:
        raise ValueError(
            f"h_q_t {tuple(h_q_t.shape)} takes scale fp32 ({m},) and x_q [{tokens}, in], "
            f"got {scale.dtype} {tuple(scale.shape)} and {tuple(x_q.shape)}"
        )
    out = _result(h_q_t, m, x_q.shape[1], accumulate_into)
    if tokens == 0 and accumulate_into is None:
        return out.zero_()
    x_q_t = transpose_int8(x_q)
    gradient, scale = h_q_t.contiguous(), scale.contiguous()
    for first in range(0, tokens, slice_tokens):
        piece = slice(first, first + slice_tokens)
        add = first > 0 or accumulate_into is not None
        int8_gemm(
            gradient[:, piece], x_q_t[:, piece], out, scale, add=add, config=config, operation="weight_gradient_int8"
        )
    return out


IN_FLIGHT = r"\A(?:(?!wait_group\.sync\.aligned\s+0).)*wait_group\.sync\.aligned\s+[1-9]"
"""PTX whose first wait, in the loop, leaves wgmma running: what transposed tiles are for."""


def _build(architecture: int, tile: Tile, *, add: bool, even: bool) -> Build:
    """The build of a tile on one architecture."""
    constexprs: dict[str, Any] = {"ADD": add, "EVEN": even, "M": tile.m, "N": tile.n, "K": tile.k, "GROUP": tile.group}
    return Build(
        f"ternary_wgrad[{'add ' if add else ''}{'' if even else 'edges '}{tile.name}]",
        transposed_gradient_kernel if tile.transposed else weight_gradient_kernel,
        {"dy": "*bf16", "s_x": "*fp32", "x_q": "*i8", "x_q_t": "*i8", "out": "*fp32"}
        | dict.fromkeys(("m", "n", "tokens", "slice_steps", "stride"), "i32"),
        constexprs,
        tile.warps,
        tile.stages,
        instruction={architecture: FLOAT16_MMA[architecture]},
        aligned=("m", "n", "stride") if tile.transposed else ("m", "n"),
        ptx=IN_FLIGHT if tile.transposed and architecture == 90 else "",
    )


BUILDS: tuple[Build, ...] = (
    *(
        _build(architecture, tile, add=add, even=even)
        for architecture, family in zip((80, 90, 100, 120), FAMILIES[1:], strict=True)
        for tile in GRADIENT_TILES[family]
        if tile.slices == 1
        for add, even in ((True, True), (False, False))
    ),
    Build(
        "ternary_wgrad[slices]",
        add_slices_kernel,
        {"slices": "*fp32", "out": "*fp32", "size": "i32"},
        {"COUNT": 8, "ADD": True, "BLOCK": _ADD_BLOCK},
        aligned=("size",),
    ),
)
"""Every tile that may be measured (split in slices it is the same kernel), and the kernels around it."""
