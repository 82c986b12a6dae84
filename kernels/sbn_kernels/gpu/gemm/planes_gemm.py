"""Forward of a ternary linear layer from codes at 2 bits: the formula and the bits of `ternary_gemm`.

    Y[t, o] = ((float(sum_i X_q[t, i] * C[o, i]) * s_x[t]) * gamma[o]) + bias[o]

C comes as planes (`planes`), a quarter of the bytes of int8, and is unpacked in registers: two shifts an element. The
kernel computes Y^T, which puts the codes on the side of the GEMM (wgmma's A) that may come from registers; X_q goes
to shared memory. Worth it where reading weights is what takes the time, at few tokens, and where int8 codes would not
fit the memory; at many tokens the unpacking is work that int8 codes do not have.
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

from sbn_kernels.formats.planes import BLOCK_CODES, check_planes, plane_codes
from sbn_kernels.gpu.gemm.ternary_gemm import check_scales, store_result
from sbn_kernels.gpu.primitives.tiles import FAMILIES, Tile, gpu_family, grouped_tile
from sbn_kernels.inspection import INT8_MMA, TCGEN05_INT8, Build
from sbn_kernels.reference import MAX_REDUCTION
from sbn_kernels.tuning import bucket_tokens, pick_tile


@triton.jit(do_not_specialize=["tokens"])
def planes_gemm_kernel(
    planes,
    x_q,
    out,
    s_x,
    gamma,
    bias,
    features,
    tokens,
    k,
    width,
    EVEN_K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out [tokens, features] of planes [features, width] and x_q [tokens, k], in blocks of 256 codes."""
    row, column = grouped_tile(tl.program_id(0), tl.cdiv(features, M), tl.cdiv(tokens, N), GROUP)
    rows = row * M + tl.arange(0, M)
    columns = column * N + tl.arange(0, N)
    inner = tl.arange(0, 64)
    code_rows = tl.where(rows < features, rows, 0).to(tl.int64)
    x_rows = tl.where(columns < tokens, columns, 0).to(tl.int64)
    planes_at = planes + code_rows[:, None] * width + inner[None, :]  # [M, 64]
    x_at = x_q + x_rows[None, :] * k + inner[:, None]  # [64, N]
    acc = tl.zeros((M, N), tl.int32)
    for start in range(0, k, 256):
        packed = tl.load(planes_at)
        for plane in tl.static_range(4):
            if EVEN_K:
                x = tl.load(x_at + plane * 64)
            else:
                x = tl.load(x_at + plane * 64, mask=(inner < k - start - plane * 64)[:, None], other=0)
            acc = tl.dot(plane_codes(packed, plane), x, acc, out_dtype=tl.int32)
        planes_at += 64
        x_at += 256
    store_result(acc, out, columns[None, :], rows[:, None], tokens, features, s_x, gamma, bias, False)


_FEW_TOKENS = (
    Tile(64, 64, BLOCK_CODES, warps=4, stages=4),
    Tile(64, 32, BLOCK_CODES, warps=4, stages=4),
    Tile(64, 16, BLOCK_CODES, warps=4, stages=6),
    Tile(128, 16, BLOCK_CODES, warps=4, stages=4),
)

PLANES_TILES: Mapping[str, tuple[Tile, ...]] = MappingProxyType(
    {
        "interpreted": (Tile(64, 32, BLOCK_CODES, warps=4),),
        "ampere": (Tile(128, 128, BLOCK_CODES), *_FEW_TOKENS),
        "hopper": (
            Tile(128, 256, BLOCK_CODES),
            Tile(256, 128, BLOCK_CODES),
            Tile(128, 128, BLOCK_CODES, stages=4),
            Tile(128, 128, BLOCK_CODES, warps=4),
            *_FEW_TOKENS,
        ),
        # Without tcgen05 the sums are in registers, and so many of them spill.
        "blackwell": (
            *((Tile(128, 256, BLOCK_CODES),) if TCGEN05_INT8 else ()),
            Tile(128, 128, BLOCK_CODES, stages=4),
            *_FEW_TOKENS,
        ),
        "blackwell_small": (Tile(128, 128, BLOCK_CODES), *_FEW_TOKENS),
    }
)
"""Tiles worth measuring: m output features, n tokens, and k always one block of planes."""

_UNALIGNED = Tile(64, 16, BLOCK_CODES, warps=4, stages=2)


def _launch(
    tile: Tile, planes: Tensor, x_q: Tensor, out: Tensor, s_x: Tensor | None, gamma: Tensor | None, bias: Tensor | None
) -> None:
    """Run the kernel on matrices x_q [tokens, k] and out [tokens, features]."""
    if tile.k != BLOCK_CODES:
        raise ValueError(f"tile {tile.name} cannot read planes in blocks: its k must be {BLOCK_CODES}")
    (tokens, k), (features, width) = x_q.shape, planes.shape
    planes_gemm_kernel[(triton.cdiv(features, tile.m) * triton.cdiv(tokens, tile.n),)](
        planes,
        x_q,
        out,
        s_x,
        gamma,
        bias,
        features,
        tokens,
        k,
        width,
        EVEN_K=k % BLOCK_CODES == 0,
        M=tile.m,
        N=tile.n,
        GROUP=tile.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )


def _product(
    operation: str,
    x_q: Tensor,
    planes: Tensor,
    scales: tuple[Tensor | None, Tensor | None, Tensor | None],
    out_dtype: torch.dtype,
    config: Tile | None,
) -> Tensor:
    """Check operands, allocate the result, pick a tile and launch."""
    k = x_q.shape[-1]
    if x_q.dtype != torch.int8:
        raise ValueError(f"x_q must be int8 [..., in], got {x_q.dtype} {tuple(x_q.shape)}")
    if k > MAX_REDUCTION:
        raise ValueError(f"dot products of length {k} are not exact: at most {MAX_REDUCTION}, split the layer")
    check_planes(planes, k)
    out = x_q.new_empty(*x_q.shape[:-1], planes.shape[0], dtype=out_dtype)
    if out.numel() == 0:
        return out
    matrix, planes, flat = x_q.reshape(-1, k).contiguous(), planes.contiguous(), out.view(-1, planes.shape[0])
    key: dict[str, int | str] = {"tokens": bucket_tokens(flat.shape[0]), "out": flat.shape[1], "in": k}
    key["dtype"] = str(out_dtype)
    tiles = PLANES_TILES[gpu_family(x_q.device)] if k % 16 == 0 else (_UNALIGNED,)

    def run(tile: Tile) -> None:
        _launch(tile, planes, matrix, flat, *scales)

    run(pick_tile(operation, key, tiles, run, device=x_q.device, config=config))
    return out


def int_matmul_planes(x_q: Tensor, planes: Tensor, *, config: Tile | None = None) -> Tensor:
    """Return x_q @ codes^T exactly, as fp32 [..., out] that holds integers: `ternary_gemm.int_matmul` from planes.

    Args:
        x_q: int8 [..., in]. planes: uint8 [out, ceil(in/256) * 64].
        config: forces a tile.

    Raises:
        ValueError: types or shapes that do not go together, or in > 131072.
    """
    return _product("int_matmul_planes", x_q, planes, (None, None, None), torch.float32, config)


def ternary_linear_planes(
    x_q: Tensor,
    s_x: Tensor,
    planes: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    config: Tile | None = None,
) -> Tensor:
    """Return Y [..., out]: `ternary_gemm.ternary_linear`, bit for bit, from planes of the codes.

    Args:
        x_q: int8 [..., in]. s_x: fp32 [...], one per token.
        planes: uint8 [out, ceil(in/256) * 64]. gamma_per_row: fp32 [out].
        bias: [out] of any float type, or None.
        out_dtype: fp32, bf16 or fp16.
        config: forces a tile.

    Raises:
        ValueError: types or shapes that do not go together, or in > 131072.
    """
    check_scales(x_q, s_x, planes.shape[0], gamma_per_row, bias)
    scales = (s_x.flatten().contiguous(), gamma_per_row.contiguous(), None if bias is None else bias.contiguous())
    return _product("ternary_linear_planes", x_q, planes, scales, out_dtype, config)


def _build(architecture: int, tile: Tile) -> Build:
    """The build of a tile on one architecture."""
    unaligned = tile == _UNALIGNED
    constexprs: dict[str, Any] = {"EVEN_K": not unaligned, "M": tile.m, "N": tile.n, "GROUP": tile.group}
    return Build(
        f"planes_gemm[{'any k ' if unaligned else ''}{tile.name}]",
        planes_gemm_kernel,
        {"planes": "*u8", "x_q": "*i8", "out": "*bf16", "s_x": "*fp32", "gamma": "*fp32", "bias": "*fp32"}
        | dict.fromkeys(("features", "tokens", "k", "width"), "i32"),
        constexprs,
        tile.warps,
        tile.stages,
        fusion=False,
        instruction={architecture: INT8_MMA[architecture]},
        aligned=("width",) if unaligned else ("features", "k", "width"),
    )


BUILDS: tuple[Build, ...] = tuple(
    _build(architecture, tile)
    for architecture, family in zip((80, 90, 100, 120), FAMILIES[1:], strict=True)
    for tile in (*PLANES_TILES[family], _UNALIGNED)
)
"""Every tile that may be measured."""
