"""Forward of a ternary linear layer, and the integer GEMMs below it, on int8 tensor cores.

    acc[t, o] = sum_i X_q[t, i] * C[o, i]                       int32, exact
    Y[t, o]   = ((float(acc) * s_x[t]) * gamma[o]) + bias[o]    fp32, rounded once to the output's type

X_q int8 [tokens, in] and C int8 [out, in] are both contiguous along in, the layout that wgmma takes for int8 (it knows
no other). The accumulator never leaves the registers before it is scaled. Sums are exact, so results have the same bits
whatever the tile; after them each operation rounds by itself, hence no fused multiply-add (`enable_fp_fusion=False`).

One kernel reads its operands through pointers, for any shape and architecture; a second one through TMA descriptors,
in a persistent loop, for sm_90 and up and rows of a multiple of 16 bytes. Which serves a shape is measured (`tiles`).
The same GEMMs from codes at 2 bits are in `planes_gemm`.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sbn_kernels.gpu.primitives.tiles import FAMILIES, Tile, gpu_family, grouped_tile, round_to
from sbn_kernels.inspection import INT8_MMA, Build
from sbn_kernels.reference import MAX_REDUCTION
from sbn_kernels.tuning import bucket_tokens, pick_tile

INT8_TILES: Mapping[str, tuple[Tile, ...]] = MappingProxyType(
    {
        "interpreted": (Tile(32, 128, 128, warps=4),),
        "ampere": (
            Tile(128, 128, 128),
            Tile(128, 128, 64, stages=4),
            Tile(64, 128, 128, warps=4),
            Tile(32, 64, 128, warps=4, stages=4),
        ),
        # On sm_90 Triton waits for an int8 wgmma before it issues the next: long steps, or two blocks a processor.
        "hopper": (
            Tile(128, 256, 256, stages=2),
            Tile(128, 256, 128, stages=4),
            Tile(128, 256, 128, stages=4, group=16),
            Tile(256, 128, 256, stages=2),
            Tile(128, 128, 256, stages=3),
            Tile(128, 128, 128, warps=4, stages=3),
            Tile(64, 128, 128, warps=4, stages=4),
            Tile(64, 64, 256, warps=4),
            Tile(128, 256, 256, stages=2, tma=True),
            Tile(128, 256, 128, stages=4, tma=True),
            Tile(128, 128, 128, stages=3, tma=True),
        ),
        "blackwell": (
            Tile(128, 256, 128, stages=3),
            Tile(128, 128, 128, stages=4),
            Tile(64, 128, 128, warps=4, stages=4),
            Tile(128, 256, 128, stages=2, tma=True),
            Tile(128, 128, 128, stages=4, tma=True),
        ),
        "blackwell_small": (
            Tile(128, 128, 64, stages=4),
            Tile(128, 128, 64, warps=4),
            Tile(64, 128, 64, warps=4, stages=4),
            Tile(64, 64, 128, warps=4),
        ),
    }
)
"""Tiles worth measuring: m tokens, n output features, k input features. Each family fits its shared memory."""

_UNALIGNED = Tile(64, 64, 32, warps=4, stages=2)


@triton.jit
def store_result(acc, out, rows, columns, m, n, row_scale, column_scale, bias, ADD: tl.constexpr):
    """Scale a block of int32 sums and store it to out [m, n]; `rows` and `columns` are its 2-d index blocks."""
    inside = (rows < m) & (columns < n)
    pointers = out + rows.to(tl.int64) * n + columns
    if row_scale is None:
        y = acc.to(out.dtype.element_ty)
    else:
        scaled = acc.to(tl.float32) * tl.load(row_scale + rows, mask=rows < m, other=0.0)
        if column_scale is not None:
            scaled = scaled * tl.load(column_scale + columns, mask=columns < n, other=0.0)
        if bias is not None:
            scaled = scaled + tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)
        y = round_to(scaled, out.dtype.element_ty)
    if ADD:
        y = tl.load(pointers, mask=inside) + y
    tl.store(pointers, y, mask=inside)


@triton.jit(do_not_specialize=["m"])
def int8_gemm_kernel(
    a,
    b,
    out,
    row_scale,
    column_scale,
    bias,
    m,
    n,
    k,
    stride_a,
    stride_b,
    ADD: tl.constexpr,
    EVEN_K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[m, n] = a[m, k] @ b[n, k]^T, scaled by `store_result`; rows of a and b are stride_a and stride_b apart."""
    row, column = grouped_tile(tl.program_id(0), tl.cdiv(m, M), tl.cdiv(n, N), GROUP)
    rows = row * M + tl.arange(0, M)
    columns = column * N + tl.arange(0, N)
    inner = tl.arange(0, K)
    # Rows past the end read row 0 instead of being masked: masks would sit in the inner loop, and are not stored.
    a_rows = tl.where(rows < m, rows, 0).to(tl.int64)
    b_rows = tl.where(columns < n, columns, 0).to(tl.int64)
    a_at = a + a_rows[:, None] * stride_a + inner[None, :]  # [M, K]
    b_at = b + b_rows[None, :] * stride_b + inner[:, None]  # [K, N]
    acc = tl.zeros((M, N), tl.int32)
    for start in range(0, k, K):
        if EVEN_K:
            x = tl.load(a_at)
            w = tl.load(b_at)
        else:
            x = tl.load(a_at, mask=inner[None, :] < k - start, other=0)
            w = tl.load(b_at, mask=inner[:, None] < k - start, other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        a_at += K
        b_at += K
    store_result(acc, out, rows[:, None], columns[None, :], m, n, row_scale, column_scale, bias, ADD)


@triton.jit(do_not_specialize=["m"])
def int8_gemm_tma_kernel(
    a,
    b,
    out,
    row_scale,
    column_scale,
    bias,
    m,
    n,
    k,
    ADD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`int8_gemm_kernel` with a and b as descriptors of [M, K] and [N, K] blocks, over all tiles in a loop."""
    tiles_m = tl.cdiv(m, M)
    tiles_n = tl.cdiv(n, N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        row, column = grouped_tile(index, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((M, N), tl.int32)
        for start in range(0, k, K):
            x = a.load([row * M, start])
            w = b.load([column * N, start])
            acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
        rows = row * M + tl.arange(0, M)
        columns = column * N + tl.arange(0, N)
        store_result(acc, out, rows[:, None], columns[None, :], m, n, row_scale, column_scale, bias, ADD)


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    """Blocks that run at one time; a few under the interpreter, so that each does several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _aligned(a: Tensor, b: Tensor) -> bool:
    """Whether rows are, and begin at, multiples of 16 bytes: what TMA and wide loads take."""
    starts = (a.shape[1], a.stride(0), b.stride(0), a.data_ptr(), b.data_ptr())
    return all(start % 16 == 0 for start in starts)


def _launch(
    tile: Tile, a: Tensor, b: Tensor, out: Tensor, scales: tuple[Tensor | None, ...], *, add: bool = False
) -> None:
    """Run one of the kernels; `scales` are those of the rows, of the columns, and the bias."""
    (m, k), n = a.shape, b.shape[0]
    if tile.tma and not _aligned(a, b):
        raise ValueError(f"tile {tile.name} reads rows through TMA, which takes multiples of 16 bytes, not {k}")
    tiles = triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    sizes: dict[str, Any] = {"M": tile.m, "N": tile.n, "K": tile.k, "GROUP": tile.group, "ADD": add}
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    if tile.tma:
        a_rows = TensorDescriptor.from_tensor(a, [tile.m, tile.k])
        b_rows = TensorDescriptor.from_tensor(b, [tile.n, tile.k])
        grid = (min(tiles, _processors(a.device)),)
        int8_gemm_tma_kernel[grid](a_rows, b_rows, out, *scales, m, n, k, **sizes, **options)
    else:
        int8_gemm_kernel[(tiles,)](
            a, b, out, *scales, m, n, k, a.stride(0), b.stride(0), EVEN_K=k % tile.k == 0, **sizes, **options
        )


def int8_gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    add: bool = False,
    config: Tile | None = None,
    operation: str = "int8_gemm",
) -> Tensor:
    """Fill (or with `add` increment) out [m, n] with a @ b^T, scaled as in the module's formula; return it.

    Args:
        a: int8 [m, k], rows contiguous and any distance apart.
        b: int8 [n, k], likewise, on a's device; k <= 131072.
        out: [m, n], contiguous: int32 or fp32 without scales, any float type with them.
        row_scale: fp32 [m], or None: no scales at all.
        column_scale: fp32 [n] or None. bias: [n] of any float type or None.
        add: out += the result.
        config: forces a tile; otherwise it is measured, and remembered for `operation`.

    Raises:
        ValueError: not int8, different k, k > 131072, or a tile that cannot read the operands.
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise ValueError(f"integer GEMMs take int8 operands, got {a.dtype} and {b.dtype}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} do not share their last dimension")
    k = a.shape[1]
    if k > MAX_REDUCTION:
        raise ValueError(f"dot products of length {k} are not exact: at most {MAX_REDUCTION}, split the layer")
    if out.numel() == 0:
        return out
    scales = (row_scale, column_scale, bias)
    # Other rows are read byte by byte: one small tile.
    tiles = INT8_TILES[gpu_family(a.device)] if _aligned(a, b) else (_UNALIGNED,)
    key: dict[str, int | str] = {
        "tokens": bucket_tokens(a.shape[0]),
        "out": b.shape[0],
        "in": k,
        "dtype": str(out.dtype),
    }

    def measured(tile: Tile) -> None:
        # On a scratch result: `out` may be one that is added to.
        _launch(tile, a, b, torch.empty_like(out), scales)

    tile = pick_tile(operation, key, tiles, measured, device=a.device, config=config)
    _launch(tile, a, b, out, scales, add=add)
    return out


def int_matmul(x_q: Tensor, codes: Tensor, *, config: Tile | None = None) -> Tensor:
    """Return x_q @ codes^T exactly, as fp32 [..., out]: `reference.int_matmul` on tensor cores.

    Integers of at most 2^24: a row-parallel caller adds them up over its ranks before it scales.

    Args:
        x_q: int8 [..., in]. codes: int8 [out, in] in {-1, 0, 1}; both are copied if they are not contiguous.
        config: forces a tile.

    Raises:
        ValueError: see `int8_gemm`.
    """
    out = x_q.new_empty(*x_q.shape[:-1], codes.shape[0], dtype=torch.float32)
    int8_gemm(_as_matrix(x_q), codes.contiguous(), _as_matrix(out), config=config, operation="int_matmul")
    return out


def int8_matmul(a: Tensor, b: Tensor, *, config: Tile | None = None) -> Tensor:
    """Return a @ b^T exactly, int32 [p, q], of int8 a [p, k] in [-127, 127] and b [q, k]: `reference.int8_matmul`.

    Sums stay below 127 * 128 * 131072 < 2^31.

    Raises:
        ValueError: see `int8_gemm`.
    """
    out = a.new_empty(a.shape[0], b.shape[0], dtype=torch.int32)
    return int8_gemm(a.contiguous(), b.contiguous(), out, config=config, operation="int8_matmul")


def ternary_linear(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    config: Tile | None = None,
) -> Tensor:
    """Return Y [..., out] of the module's formula: the bits of `reference.ternary_linear`, in one kernel.

    Args:
        x_q: int8 [..., in]. s_x: fp32 [...], one per token.
        codes: int8 [out, in] in {-1, 0, 1}. gamma_per_row: fp32 [out].
        bias: [out] of any float type, or None.
        out_dtype: fp32, bf16 or fp16.
        config: forces a tile.

    Raises:
        ValueError: scales, bias or codes of a wrong shape; see `int8_gemm` for the rest.
    """
    check_scales(x_q, s_x, codes.shape[0], gamma_per_row, bias)
    out = x_q.new_empty(*x_q.shape[:-1], codes.shape[0], dtype=out_dtype)
    scales = (s_x.flatten().contiguous(), gamma_per_row.contiguous(), None if bias is None else bias.contiguous())
    int8_gemm(_as_matrix(x_q), codes.contiguous(), _as_matrix(out), *scales, config=config, operation="ternary_linear")
    return out


def check_scales(x_q: Tensor, s_x: Tensor, rows: int, gamma_per_row: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless s_x is fp32 [...] for x_q [..., in], gamma_per_row fp32 [rows], and bias [rows]."""
    for name, scale, shape in (("s_x", s_x, x_q.shape[:-1]), ("gamma_per_row", gamma_per_row, (rows,))):
        if scale.dtype != torch.float32 or scale.shape != torch.Size(shape):
            raise ValueError(f"{name} must be fp32 {tuple(shape)}, got {scale.dtype} {tuple(scale.shape)}")
    if bias is not None and (bias.shape != (rows,) or not bias.is_floating_point()):
        raise ValueError(f"bias must be float ({rows},), got {bias.dtype} {tuple(bias.shape)}")


def _as_matrix(t: Tensor) -> Tensor:
    """[..., k] as contiguous [tokens, k]; a view of what is contiguous already."""
    return t.reshape(-1, t.shape[-1]).contiguous() if t.numel() else t.reshape(0, t.shape[-1])


_OPERANDS = {"a": "*i8", "b": "*i8", "row_scale": "*fp32", "column_scale": "*fp32", "bias": "*fp32"}
_SIZES = dict.fromkeys(("m", "n", "k", "stride_a", "stride_b"), "i32")
_MAIN = {80: Tile(128, 128, 128), 90: Tile(128, 256, 128), 100: Tile(128, 256, 128), 120: Tile(128, 128, 64)}


def _build(
    name: str, architecture: int, tile: Tile, out: str = "bf16", *, scaled: bool = True, aligned: bool = True
) -> Build:
    """The build of a tile on one architecture."""
    constexprs: dict[str, Any] = {"ADD": False, "M": tile.m, "N": tile.n, "K": tile.k, "GROUP": tile.group}
    constexprs |= {} if scaled else {"row_scale": None, "column_scale": None, "bias": None}
    signature = {**_OPERANDS, "out": f"*{out}", **_SIZES}
    if tile.tma:
        signature |= {"a": f"tensordesc<i8[{tile.m}, {tile.k}]>", "b": f"tensordesc<i8[{tile.n}, {tile.k}]>"}
    else:
        constexprs["EVEN_K"] = name == "linear"
    return Build(
        f"ternary_gemm[{name} {tile.name}]",
        int8_gemm_tma_kernel if tile.tma else int8_gemm_kernel,
        signature,
        constexprs,
        tile.warps,
        tile.stages,
        fusion=False,
        instruction={architecture: INT8_MMA[architecture]},
        aligned=("n", "k", "stride_a", "stride_b") if aligned else (),
    )


BUILDS: tuple[Build, ...] = tuple(
    build
    for architecture, family in zip((80, 90, 100, 120), FAMILIES[1:], strict=True)
    for build in (
        *(_build("linear", architecture, tile) for tile in INT8_TILES[family]),
        _build("k of 16s", architecture, _MAIN[architecture]),
        _build("any k", architecture, _UNALIGNED, aligned=False),
        _build("fp32 sums", architecture, _MAIN[architecture], "fp32", scaled=False),
        _build("int32 sums", architecture, _MAIN[architecture], "i32", scaled=False),
    )
)
"""Every tile that may be measured, and the other forms of the kernel on each architecture's main tile."""
