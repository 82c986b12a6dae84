"""The forward GEMM on Hopper with its int8 multiplications always in flight. Opt-in: never run on hardware.

    acc[t, o] = sum_i X_q[t, i] * C[o, i]                       int32, exact
    Y[t, o]   = ((float(acc) * s_x[t]) * gamma[o]) + bias[o]    fp32, rounded once to the output's type

The same bits as `ternary_gemm`, whose kernel waits on sm_90 for each int8 wgmma before it issues the next: Triton
keeps a wgmma in flight across steps only where it accumulates in fp32. Hence Gluon, in which the waits are written out.

A block of threads works through its tiles in one run of steps, numbered from 0 across tiles. Step `s` lies in slot
`s % STAGES` of a ring in shared memory, and the slot's mbarrier completes its phase `s // STAGES` when both of its
operands have arrived. Per step:

    wait until step s arrived;  issue its wgmma;  wait until at most one wgmma is in flight, so step s - 1 is done;
    start the copies of step s + STAGES - 1 into the slot that step s - 1 had

The copies run ahead of the end of a tile, so the next tile's operands arrive while this one's result is stored. Rows
past the end of an operand arrive as zeros. Results of two bytes are rearranged from the accumulator's fragments into 16
consecutive bytes a thread, each warp by itself through 512 bytes beside the ring; fp32 fills whole sectors as it is.

Status: instructions, waits, registers and spills are read from the machine code; the kernel's own source is run by
tests against an emulation of copies, barriers and wgmma that arrive as early or as late as they may.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sbn_kernels.gpu.gemm.ternary_gemm import check_scales
from sbn_kernels.gpu.primitives.tiles import Tile, grouped_tile
from sbn_kernels.inspection import INT8_MMA, SHARED_LIMIT, Build
from sbn_kernels.reference import MAX_REDUCTION
from sbn_kernels.tuning import bucket_tokens, pick_tile

start_copy = tma.async_load if "async_load" in tma.__all__ else tma.async_copy_global_to_shared
"""TMA from global to shared memory: Triton 3.9's name for it, or that of 3.6."""

WGMMA_TILES: tuple[Tile, ...] = (
    Tile(128, 256, 128, stages=4, tma=True),
    Tile(128, 256, 128, stages=4, group=16, tma=True),
    Tile(256, 128, 128, stages=4, tma=True),
    Tile(128, 128, 128, warps=4, stages=3, tma=True),
    Tile(64, 128, 128, warps=4, stages=4, tma=True),
    Tile(64, 64, 128, warps=4, stages=4, tma=True),
)
"""Tiles worth measuring: m tokens, n output features, k input features. Those of 4 warps fit twice on a processor."""

_OPERAND = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
_OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)
_BARRIER_BYTES = 8
_TURN_BYTES = 512  # per warp, to turn the result
_RESERVED_BYTES = 1024  # of shared memory, by CUDA, per block


@gluon.jit
def copy_step(
    a, b, a_ring, b_ring, arrived, number, index, row, column, step, steps, tiles_m, tiles_n,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Start the copies of step `step` of tile `index` at (row, column), this block's step `number`, if it exists.

    Returns the same five numbers of the block's next step.
    """
    exists = index < tiles_m * tiles_n
    slot = number % STAGES
    barrier = arrived.index(slot)
    mbarrier.expect(barrier, (M + N) * K, pred=exists)
    start_copy(a, [row * M, step * K], barrier, a_ring.index(slot), pred=exists)
    start_copy(b, [column * N, step * K], barrier, b_ring.index(slot), pred=exists)
    step += 1
    if step == steps:
        step -= steps
        index += gl.num_programs(0)
        row, column = grouped_tile(gl.minimum(index, tiles_m * tiles_n - 1), tiles_m, tiles_n, GROUP)
    return number + 1, index, row, column, step


@gluon.jit
def store_columns(
    acc, out, row_scale, column_scale, bias, first_row, first_column, m, n,
    M: gl.constexpr, N: gl.constexpr, PART: gl.constexpr, PRODUCT: gl.constexpr, RESULT: gl.constexpr,
):  # fmt: skip
    """Scale the int32 sums [M, N] and store them to out [m, n], beginning at (first_row, first_column).

    In parts of PART columns: the scales of all of them beside the sums would not fit the registers.
    """
    if N > PART:
        left, right = gl.split(acc.reshape([M, 2, N // 2]).permute([0, 2, 1]))
        store_columns(
            left, out, row_scale, column_scale, bias, first_row, first_column, m, n, M, N // 2, PART, PRODUCT, RESULT
        )
        store_columns(
            right, out, row_scale, column_scale, bias, first_row, first_column + N // 2, m, n,
            M, N // 2, PART, PRODUCT, RESULT,
        )  # fmt: skip
    else:
        rows = first_row + gl.arange(0, M, gl.SliceLayout(1, PRODUCT))
        columns = first_column + gl.arange(0, N, gl.SliceLayout(0, PRODUCT))
        y = gl.convert_layout(acc, PRODUCT).to(gl.float32)
        if row_scale is not None:
            y = y * gl.load(row_scale + rows, mask=rows < m, other=0.0)[:, None]
            y = y * gl.load(column_scale + columns, mask=columns < n, other=0.0)[None, :]
        if bias is not None:
            y = y + gl.load(bias + columns, mask=columns < n, other=0.0).to(gl.float32)[None, :]
        y = gl.convert_layout(y.to(out.dtype.element_ty), RESULT)
        rows = first_row + gl.arange(0, M, gl.SliceLayout(1, RESULT))
        columns = first_column + gl.arange(0, N, gl.SliceLayout(0, RESULT))
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        gl.store(out + rows.to(gl.int64)[:, None] * n + columns[None, :], y, mask=inside)


@gluon.jit(do_not_specialize=["m"])
def wgmma_gemm_kernel(
    a, b, out, row_scale, column_scale, bias, m, n, k,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    PART: gl.constexpr, PRODUCT: gl.constexpr, PART_PRODUCT: gl.constexpr, RESULT: gl.constexpr,
):  # fmt: skip
    """out[m, n] = a[m, k] @ b[n, k]^T, scaled; a and b are descriptors of blocks [M, K] and [N, K]."""
    tiles_m = gl.cdiv(m, M)
    tiles_n = gl.cdiv(n, N)
    steps = gl.cdiv(k, K)
    a_ring = gl.allocate_shared_memory(gl.int8, [STAGES, M, K], a.layout)
    b_ring = gl.allocate_shared_memory(gl.int8, [STAGES, N, K], b.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(arrived.index(i), count=1)
    fence_async_shared()
    # The next step to copy; `done` below is the next to multiply.
    number = gl.to_tensor(0)
    index = gl.program_id(0)
    row, column = grouped_tile(index, tiles_m, tiles_n, GROUP)
    step = gl.to_tensor(0)
    for _first in gl.static_range(STAGES - 1):
        number, index, row, column, step = copy_step(
            a, b, a_ring, b_ring, arrived, number, index, row, column, step, steps, tiles_m, tiles_n,
            M, N, K, STAGES, GROUP,
        )  # fmt: skip
    done = gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        acc = gl.zeros([M, N], gl.int32, PRODUCT)
        for _step in range(steps):
            slot = done % STAGES
            mbarrier.wait(arrived.index(slot), (done // STAGES) & 1)
            acc = warpgroup_mma(a_ring.index(slot), b_ring.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
            number, index, row, column, step = copy_step(
                a, b, a_ring, b_ring, arrived, number, index, row, column, step, steps, tiles_m, tiles_n,
                M, N, K, STAGES, GROUP,
            )  # fmt: skip
            done += 1
        acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        done_row, done_column = grouped_tile(tile, tiles_m, tiles_n, GROUP)
        store_columns(
            acc, out, row_scale, column_scale, bias, done_row * M, done_column * N, m, n,
            M, N, PART, PART_PRODUCT, RESULT,
        )  # fmt: skip


def part_columns(tile: Tile) -> int:
    """Columns of a tile that are scaled and stored at one time."""
    return min(tile.n // 2, 64)


def product_layout(tile: Tile, columns: int) -> gl.NVMMADistributedLayout:
    """How threads hold sums [tile.m, columns]: wgmma's fragments, at most 128 wide (Triton's widest for int8)."""
    return gl.NVMMADistributedLayout([3, 0], [tile.warps, 1], [16, min(columns, 128), 32])


def result_layout(
    tile: Tile, columns: int, element_bytes: int
) -> gl.NVMMADistributedLayout | gl.DistributedLinearLayout:
    """How they hold a result [tile.m, columns] when it is stored: as it is, or 16 bytes of two-byte elements each.

    Rows stay in their warp, and columns in the four threads that wgmma gave them to. These then write 64 bytes at once,
    32 (a sector) in fp32, which as it is would be 16 for two-byte elements.
    """
    if element_bytes == 4:
        return product_layout(tile, columns)
    bits = [[0, 1 << i] for i in range(columns.bit_length() - 1)]
    lanes = [*bits[3:5], [1, 0], [2, 0], [4, 0]]
    warps = [[16 << i, 0] for i in range(tile.warps.bit_length() - 1)]
    rest = [[i, 0] for i in (16 * tile.warps << j for j in range(8)) if i < tile.m]
    registers = [*bits[:3], *bits[5:], [8, 0], *rest]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [tile.m, columns])


def why_not(in_features: int) -> str | None:
    """Return why this kernel cannot serve layers of `in_features` on this machine; None if it can."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if capability != (9, 0):
        found = "no CUDA device" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
        return f"its instructions are those of compute capability 9.0 (H100, H200), here is {found}"
    if in_features % 16 or not 0 < in_features <= MAX_REDUCTION:
        return f"it takes in_features in multiples of 16 up to {MAX_REDUCTION}, not {in_features}"
    return None


@lru_cache(maxsize=64)
def _grid(tile: Tile, device: torch.device) -> int:
    """Blocks of this tile that run at one time."""
    ring = tile.stages * ((tile.m + tile.n) * tile.k + _BARRIER_BYTES)
    shared = ring + tile.warps * _TURN_BYTES + _RESERVED_BYTES
    resident = (SHARED_LIMIT[90] + _RESERVED_BYTES) // shared
    return torch.cuda.get_device_properties(device).multi_processor_count * resident


def _launch(tile: Tile, a: Tensor, b: Tensor, out: Tensor, scales: tuple[Tensor | None, ...]) -> None:
    """Run the kernel; `scales` are those of the rows, of the columns, and the bias."""
    (m, k), n = a.shape, b.shape[0]
    tiles = triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    wgmma_gemm_kernel[(min(tiles, _grid(tile, a.device)),)](
        TensorDescriptor.from_tensor(a, [tile.m, tile.k], _OPERAND),
        TensorDescriptor.from_tensor(b, [tile.n, tile.k], _OPERAND),
        *(out, *scales, m, n, k),
        **_constants(tile, out.element_size()),
        num_warps=tile.warps,
        enable_fp_fusion=False,
    )


@lru_cache(maxsize=64)
def _constants(tile: Tile, element_bytes: int) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    sizes = {"M": tile.m, "N": tile.n, "K": tile.k, "STAGES": tile.stages, "GROUP": tile.group}
    part = part_columns(tile)
    layouts = {"PRODUCT": product_layout(tile, tile.n), "PART_PRODUCT": product_layout(tile, part)}
    return {**sizes, "PART": part, **layouts, "RESULT": result_layout(tile, part, element_bytes)}


def _run(
    operation: str, x_q: Tensor, codes: Tensor, out: Tensor, scales: tuple[Tensor | None, ...], config: Tile | None
) -> Tensor:
    """Fill out [..., out] with x_q @ codes^T, scaled; return it."""
    a, b, result = x_q.reshape(-1, x_q.shape[-1]).contiguous(), codes.contiguous(), out.view(-1, out.shape[-1])
    # A view may begin anywhere, TMA reads from multiples of 16 bytes.
    a, b = (t if t.data_ptr() % 16 == 0 else t.clone() for t in (a, b))
    key: dict[str, int | str] = {"tokens": bucket_tokens(len(a)), "out": len(b), "in": a.shape[1]}
    key["dtype"] = str(out.dtype)

    def measured(tile: Tile) -> None:
        _launch(tile, a, b, result, scales)

    tile = pick_tile(operation, key, WGMMA_TILES, measured, device=a.device, config=config)
    _launch(tile, a, b, result, scales)
    return out


def _check(x_q: Tensor, codes: Tensor) -> None:
    """Raise ValueError unless these are operands for this kernel, on a machine for it."""
    if x_q.dtype != torch.int8 or codes.dtype != torch.int8:
        raise ValueError(f"integer GEMMs take int8 operands, got {x_q.dtype} and {codes.dtype}")
    if codes.dim() != 2 or x_q.shape[-1] != codes.shape[1]:
        raise ValueError(f"shapes {tuple(x_q.shape)} and {tuple(codes.shape)} do not share their last dimension")
    reason = why_not(codes.shape[1])
    if reason is not None:
        raise ValueError(f"the wgmma kernel cannot serve a layer of {codes.shape[0]} x {codes.shape[1]}: {reason}")
    if not x_q.is_cuda or x_q.device != codes.device:
        raise ValueError(f"the wgmma kernel takes tensors of one CUDA device, got {x_q.device} and {codes.device}")


def ternary_linear_wgmma(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    config: Tile | None = None,
) -> Tensor:
    """Return Y [..., out] of the module's formula: the bits of `reference.ternary_linear`. sm_90 only.

    Args:
        x_q: int8 [..., in], in a multiple of 16 up to 131072. s_x: fp32 [...], one per token.
        codes: int8 [out, in] in {-1, 0, 1}. gamma_per_row: fp32 [out].
        bias: [out] of any float type, or None.
        out_dtype: fp32, bf16 or fp16.
        config: forces a tile; otherwise it is measured (`tuning`).

    Raises:
        ValueError: types, shapes or a machine that are not these.
    """
    check_scales(x_q, s_x, codes.shape[0], gamma_per_row, bias)
    if out_dtype not in _OUTPUTS:
        raise ValueError(f"out_dtype must be fp32, bf16 or fp16, got {out_dtype}")
    _check(x_q, codes)
    out = x_q.new_empty(*x_q.shape[:-1], codes.shape[0], dtype=out_dtype)
    if out.numel() == 0:
        return out
    scales = (s_x.flatten().contiguous(), gamma_per_row.contiguous(), None if bias is None else bias.contiguous())
    return _run("ternary_linear_wgmma", x_q, codes, out, scales, config)


def int_matmul_wgmma(x_q: Tensor, codes: Tensor, *, config: Tile | None = None) -> Tensor:
    """Return x_q @ codes^T exactly, as fp32 [..., out]: `reference.int_matmul`. sm_90 only.

    Args:
        x_q: int8 [..., in], in a multiple of 16 up to 131072. codes: int8 [out, in] in {-1, 0, 1}.
        config: forces a tile.

    Raises:
        ValueError: see `ternary_linear_wgmma`.
    """
    _check(x_q, codes)
    out = x_q.new_empty(*x_q.shape[:-1], codes.shape[0], dtype=torch.float32)
    return out if out.numel() == 0 else _run("int_matmul_wgmma", x_q, codes, out, (None, None, None), config)


PRODUCT_STAYS_IN_FLIGHT = (
    # Between the wait and the copies into the slot that the last wgmma read, all threads meet.
    r"wgmma\.wait_group\.sync\.aligned \t?1;(?:(?!cp\.async\.bulk\.tensor|wgmma\.mma_async).)*?bar\.sync"
    r".*?cp\.async\.bulk\.tensor"
)
"""What the PTX of a step must have: a wait that leaves one wgmma running, a barrier, the copies; in this order."""


def _build(
    name: str,
    tile: Tile,
    output: str,
    *,
    biased: bool = False,
    scaled: bool = True,
    aligned: tuple[str, ...] = ("n", "k"),
) -> Build:
    """The build of a tile."""
    signature = {
        name: f"tensordesc<i8[{rows}, {tile.k}],{_OPERAND!r}>" for name, rows in (("a", tile.m), ("b", tile.n))
    }
    signature |= {"out": f"*{output}", "row_scale": "*fp32", "column_scale": "*fp32", "bias": "*fp32"}
    signature |= dict.fromkeys(("m", "n", "k"), "i32")
    absent = ("bias",) if scaled else ("bias", "row_scale", "column_scale")
    return Build(
        f"wgmma_gemm[{name} {tile.name}]",
        wgmma_gemm_kernel,
        signature,
        {**_constants(tile, 4 if output == "fp32" else 2), **({} if biased else dict.fromkeys(absent))},
        tile.warps,
        fusion=False,
        instruction={90: INT8_MMA[90]},
        aligned=aligned,
        ptx=PRODUCT_STAYS_IN_FLIGHT,
    )


BUILDS: tuple[Build, ...] = (
    *(_build("bf16", tile, "bf16") for tile in WGMMA_TILES),
    *(_build("bf16 bias", tile, "bf16", biased=True) for tile in WGMMA_TILES),
    *(_build("fp32 bias", tile, "fp32", biased=True) for tile in WGMMA_TILES),
    _build("fp32 sums", WGMMA_TILES[0], "fp32", scaled=False),
    _build("bf16 bias, odd out", WGMMA_TILES[0], "bf16", biased=True, aligned=("k",)),
)
"""Every tile that may be measured."""
