"""Gradient of a ternary linear layer's input: floating dY times codes that never become floating weights in memory.

    dX[t, i] = sum_o (dY[t, o] * gamma[o]) * C[o, i]        fp32 accumulation, rounded once to dY's type

Codes are read transposed, C^T int8 [in, out] or planes of it at 2 bits (`planes.codes_to_planes`), so that both are
contiguous along the sum. The kernel computes dX^T: the codes are then on the side of the GEMM (wgmma's A) that may
come from registers, where they are converted, while dY goes to shared memory untouched.

gamma belongs to the index that is summed over, and each part of the rows has one value. Three ways, chosen on the host
from where the parts begin (nothing is read back from the device):

    uniform    one part: dX = gamma * (dY @ C), applied to the sum
    segments   every part begins at a multiple of the tile's k: where one begins, the sum so far is multiplied by
               gamma_before / gamma_next, at the end by the last gamma: one accumulator, a bare inner loop
    general    dY * gamma in fp32, rounded to dY's type, before the GEMM

Error of a value against the exact one, with S = sum_o |dY * gamma * C|, u = 2^-8 (bf16), 2^-11 (fp16), 2^-24 (fp32)
the unit roundoff of dY's type, and L the number of segments (fp16 adds 2^-25 to each rounding, its smallest numbers):

    |error| <= u |dX| + (out + 2 L + 2) 2^-24 S             and u S more in the general way

The bits depend on the tile, hence on what was measured (`tuning`). Quantized rows need none of this: with
`(g_q, s) = quantize_rows(dY * gamma)`, `ternary_gemm.ternary_linear(g_q, s, C^T, ones)` is dX, on int8 tensor cores.
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

from sbn_kernels.formats.planes import BLOCK_BYTES, plane_bytes, plane_codes
from sbn_kernels.gpu.primitives.tiles import (
    FAMILIES,
    Tile,
    codes_to_float,
    dot_floats,
    gpu_family,
    grouped_tile,
    round_to,
)
from sbn_kernels.inspection import FLOAT16_MMA, Build
from sbn_kernels.tuning import bucket_tokens, pick_tile


@triton.jit
def add_products(acc, codes_at, dy_at, gamma, inner, first, last, GENERAL, PLANES, EVEN_K, K: tl.constexpr):
    """The fp32 block acc [M, N] + codes [M, first:last] @ dy [first:last, N]."""
    dtype: tl.constexpr = dy_at.dtype.element_ty
    for start in range(first, last, K):
        inside = inner < last - start
        if PLANES:
            packed = tl.load(codes_at + (start // 256) * 64)
            codes = plane_codes(packed, (start // 64) % 4)
        elif EVEN_K:
            codes = tl.load(codes_at + start)
        else:
            codes = tl.load(codes_at + start, mask=inside[None, :], other=0)
        x = tl.load(dy_at + start) if EVEN_K else tl.load(dy_at + start, mask=inside[:, None], other=0.0)
        if GENERAL:
            scale = tl.load(gamma + start + inner, mask=inside, other=0.0)
            x = round_to(x.to(tl.float32) * scale[:, None], dtype)
        acc = dot_floats(codes_to_float(codes, dtype), x, acc)
    return acc


@triton.jit(do_not_specialize=["tokens", "segments"])
def dgrad_kernel(
    codes_t,
    dy,
    out,
    gamma,
    starts,
    features,
    tokens,
    k,
    stride_codes,
    segments,
    MODE: tl.constexpr,
    PLANES: tl.constexpr,
    EVEN_K: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[tokens, features]; dy [tokens, k]; gamma [k]; starts [segments + 1]: where parts begin and end, in 16s."""
    row, column = grouped_tile(tl.program_id(0), tl.cdiv(features, M), tl.cdiv(tokens, N), GROUP)
    rows = row * M + tl.arange(0, M)
    columns = column * N + tl.arange(0, N)
    inner = tl.arange(0, K)
    code_rows = tl.where(rows < features, rows, 0).to(tl.int64)
    dy_rows = tl.where(columns < tokens, columns, 0).to(tl.int64)
    codes_at = codes_t + code_rows[:, None] * stride_codes + inner[None, :]  # [M, K]
    dy_at = dy + dy_rows[None, :] * k + inner[:, None]  # [K, N]
    acc = tl.zeros((M, N), tl.float32)
    if MODE == "segments":
        scale = tl.load(gamma)
        for segment in range(segments):
            # In 16s, so that the compiler knows the alignment of what is read from there.
            first = tl.load(starts + segment) * 16
            last = tl.minimum(tl.load(starts + segment + 1) * 16, k)
            following = tl.load(gamma + first)
            acc = acc * tl.div_rn(scale, following)
            scale = following
            acc = add_products(acc, codes_at, dy_at, gamma, inner, first, last, False, PLANES, EVEN_K, K)
        acc = acc * scale
    else:
        acc = add_products(acc, codes_at, dy_at, gamma, inner, 0, k, MODE == "general", PLANES, EVEN_K, K)
        if MODE == "uniform":
            acc = acc * tl.load(gamma)
    inside = (rows < features)[:, None] & (columns < tokens)[None, :]
    pointers = out + columns.to(tl.int64)[None, :] * features + rows[:, None]
    tl.store(pointers, round_to(acc, out.dtype.element_ty), mask=inside)


DGRAD_TILES: Mapping[str, tuple[Tile, ...]] = MappingProxyType(
    {
        "interpreted": (Tile(32, 32, 64, warps=4),),
        "ampere": (
            Tile(128, 128, 64),
            Tile(128, 128, 32, stages=4),
            Tile(64, 64, 64, warps=4),
        ),
        "hopper": (
            Tile(128, 256, 64, stages=3),
            Tile(128, 256, 64, stages=4),
            Tile(128, 256, 64, stages=4, group=16),
            Tile(256, 128, 64, stages=4),
            Tile(128, 128, 64, stages=4),
            Tile(128, 128, 64, warps=4, stages=3),
            Tile(64, 64, 64, warps=4, stages=4),
        ),
        "blackwell": (Tile(128, 256, 64, stages=3), Tile(128, 128, 64, stages=4), Tile(64, 64, 64, warps=4, stages=4)),
        "blackwell_small": (Tile(128, 128, 64, stages=2), Tile(128, 128, 32), Tile(64, 64, 64, warps=4)),
    }
)
"""Tiles worth measuring for bf16 and fp16: m input features, n tokens, k output features."""

_FP32 = Tile(64, 64, 32, warps=4, stages=2)
_UNALIGNED = Tile(64, 32, 64, warps=4, stages=2)


def merged_parts(part_rows: tuple[tuple[int, int, int], ...] | None, rows: int) -> tuple[int, ...]:
    """Where the runs of rows with one scale begin, and `rows`: (0, 1024, 1536) for two runs.

    Args:
        part_rows: (start, length, part) of consecutive runs of rows; None is one part. Parts may come back.
        rows: what the runs add up to.

    Raises:
        ValueError: they are not consecutive from 0 to `rows`.
    """
    runs = ((0, rows, 0),) if part_rows is None else part_rows
    bounds = [start for start, _, _ in runs] + [rows]
    ends = [start + length for start, length, _ in runs]
    if bounds[0] != 0 or ends != bounds[1:] or any(length < 1 for _, length, _ in runs):
        raise ValueError(f"part_rows {part_rows} are not consecutive runs (start, length, part) of {rows} rows")
    begins = [
        start for (start, _, part), before in zip(runs, (None, *runs), strict=False) if not before or before[2] != part
    ]
    return (*begins, rows)


def scale_mode(bounds: tuple[int, ...], step: int) -> str:
    """ "uniform", "segments" or "general" (see the module) for runs of rows and a tile's k."""
    if len(bounds) == 2:
        return "uniform"
    return "segments" if all(bound % step == 0 for bound in bounds[:-1]) and step % 16 == 0 else "general"


@lru_cache(maxsize=256)
def _starts(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """Bounds in 16s, the last rounded up, on the device: copied there once."""
    return torch.tensor([-(-bound // 16) for bound in bounds], dtype=torch.int32, device=device)


def _launch(tile: Tile, dy: Tensor, gamma: Tensor, codes_t: Tensor, bounds: tuple[int, ...], out: Tensor) -> None:
    """Run the kernel on matrices dy [tokens, k] and out [tokens, features]."""
    (tokens, k), features = dy.shape, out.shape[1]
    planes = codes_t.dtype == torch.uint8
    if planes and tile.k != BLOCK_BYTES:
        raise ValueError(f"tile {tile.name} cannot read planes: its k must be {BLOCK_BYTES}")
    grid = (triton.cdiv(features, tile.m) * triton.cdiv(tokens, tile.n),)
    dgrad_kernel[grid](
        codes_t,
        dy,
        out,
        gamma,
        _starts(bounds, dy.device),
        features,
        tokens,
        k,
        codes_t.stride(0),
        len(bounds) - 1,
        MODE=scale_mode(bounds, tile.k),
        PLANES=planes,
        EVEN_K=k % tile.k == 0,
        M=tile.m,
        N=tile.n,
        K=tile.k,
        GROUP=tile.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _candidates(dy: Tensor, planes: bool) -> tuple[Tile, ...]:
    """The tiles for a type, alignment and form of codes."""
    family = gpu_family(dy.device)
    if family == "interpreted":
        return DGRAD_TILES[family]
    if dy.dtype == torch.float32 and not planes:
        return (_FP32,)
    if dy.dtype == torch.float32 or dy.shape[1] % 16:
        return (_UNALIGNED,)
    return tuple(tile for tile in DGRAD_TILES[family] if not planes or tile.k == BLOCK_BYTES)


def ternary_dgrad(
    dy: Tensor,
    gamma_per_row: Tensor,
    codes_t: Tensor,
    part_rows: tuple[tuple[int, int, int], ...] | None = None,
    *,
    config: Tile | None = None,
) -> Tensor:
    """Return dX [..., in] = (dY * gamma) @ C in dY's type: see the module for the formula and its error.

    Args:
        dy: bf16, fp16 or fp32 [..., out]; fp32 is multiplied as it is (no TF32).
        gamma_per_row: fp32 [out], positive, one value for each run of `part_rows`.
        codes_t: int8 [in, out], or uint8 [in, ceil(out/256) * 64], planes of it.
        part_rows: (start, length, part) of the consecutive runs of rows with one scale; None: all rows have one.
        config: forces a tile.

    Raises:
        ValueError: types or shapes that do not go together, or runs that are not consecutive.
    """
    rows = dy.shape[-1]
    planes = codes_t.dtype == torch.uint8
    width = plane_bytes(rows) if planes else rows
    if dy.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dy must be fp32, bf16 or fp16, got {dy.dtype}")
    if codes_t.dtype not in (torch.int8, torch.uint8) or codes_t.dim() != 2 or codes_t.shape[1] != width:
        raise ValueError(
            f"dy [..., {rows}] takes codes_t int8 [in, {rows}] or its planes, "
            f"got {codes_t.dtype} {tuple(codes_t.shape)}"
        )
    if gamma_per_row.dtype != torch.float32 or gamma_per_row.shape != (rows,):
        raise ValueError(
            f"gamma_per_row must be fp32 ({rows},), got {gamma_per_row.dtype} {tuple(gamma_per_row.shape)}"
        )
    bounds = merged_parts(part_rows, rows)
    features = codes_t.shape[0]
    out = dy.new_empty(*dy.shape[:-1], features)
    if out.numel() == 0:
        return out
    matrix, codes_t, gamma = dy.reshape(-1, rows).contiguous(), codes_t.contiguous(), gamma_per_row.contiguous()
    flat = out.view(-1, features)
    key: dict[str, int | str] = {"tokens": bucket_tokens(matrix.shape[0]), "out": rows, "in": features}
    key |= {"dtype": str(dy.dtype), "codes": str(codes_t.dtype), "runs": len(bounds) - 1}

    def run(tile: Tile) -> None:
        _launch(tile, matrix, gamma, codes_t, bounds, flat)

    run(pick_tile("ternary_dgrad", key, _candidates(matrix, planes), run, device=dy.device, config=config))
    return out


def _build(architecture: int, tile: Tile, mode: str, *, planes: bool = False, dtype: str = "bf16") -> Build:
    """The build of a tile on one architecture."""
    signature = {"codes_t": "*u8" if planes else "*i8", "dy": f"*{dtype}", "out": f"*{dtype}", "gamma": "*fp32"}
    signature |= {"starts": "*i32", **dict.fromkeys(("features", "tokens", "k", "stride_codes", "segments"), "i32")}
    constexprs: dict[str, Any] = {"MODE": mode, "PLANES": planes, "EVEN_K": tile != _UNALIGNED}
    constexprs |= {"M": tile.m, "N": tile.n, "K": tile.k, "GROUP": tile.group}
    return Build(
        f"ternary_dgrad[{mode}{' planes' if planes else ''} {dtype} {tile.name}]",
        dgrad_kernel,
        signature,
        constexprs,
        tile.warps,
        tile.stages,
        instruction={architecture: FLOAT16_MMA[architecture] if dtype != "fp32" else "FFMA"},
        aligned=() if tile == _UNALIGNED else ("features", "k", "stride_codes"),
    )


BUILDS: tuple[Build, ...] = tuple(
    build
    for architecture, family in zip((80, 90, 100, 120), FAMILIES[1:], strict=True)
    for build in (
        *(
            _build(architecture, tile, mode, planes=planes)
            for tile in DGRAD_TILES[family]
            for mode, planes in (("uniform", False), ("segments", False), ("general", False), ("segments", True))
            if not planes or tile.k == BLOCK_BYTES
        ),
        _build(architecture, _UNALIGNED, "general"),
    )
)
"""Every tile that may be measured, in every mode (the fp32 form has no matrix instruction to look for)."""
