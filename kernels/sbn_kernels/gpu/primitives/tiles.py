"""Tiles of the matrix kernels: their sizes, the order they are worked through, and rounding inside a kernel.

Every GEMM here is laid out as out[m, n] = sum_k a[m, k] * b[n, k], both operands contiguous along k. A `Tile` says
how much of it one block of threads computes. Each kernel module lists the tiles worth measuring for each family of
GPUs, and takes one of them by measurement (`tuning.pick_tile`).

Order: tiles are numbered in groups of `group` rows, column by column inside a group. The blocks that run at one time
then cover a near-square patch of the result, and the rows of a and b that they share are read from L2 once.

Three traps of the interpreter (TRITON_INTERPRET=1) are kept here, away from the kernels: it truncates when it converts
fp32 to bf16, takes integers for bit patterns of bf16, and multiplies the bit patterns of bf16 matrices.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether the kernels of this process run interpreted, decided when they are imported."""

FAMILIES = ("interpreted", "ampere", "hopper", "blackwell", "blackwell_small")
"""Kinds of GPU that want different tiles: sm_80 to 89, sm_90, sm_100 to 110, sm_120 and up."""


@dataclass(frozen=True)
class Tile:
    """What one block of threads computes of out[m, n] = sum_k a[m, k] * b[n, k].

    Attributes:
        m, n: rows and columns of the result.
        k: elements along the sum per step.
        warps, stages: threads / 32, and depth of the software pipeline.
        group: rows of tiles in a group of the order (see the module).
        tma: operands come through the tensor memory accelerator, in a persistent kernel (sm_90 and up).
        slices: parts the sum is split into, added up in order by a second kernel (`weight_gradient` only).
        transposed: computes the transposed result, from one operand transposed first (`weight_gradient` only).
    """

    m: int
    n: int
    k: int
    warps: int = 8
    stages: int = 3
    group: int = 8
    tma: bool = False
    slices: int = 1
    transposed: bool = False

    @cached_property
    def name(self) -> str:
        """What the table of measurements calls it: "128x256x128-w8-s3-g8"."""
        extras = "-tma" * self.tma + f"-x{self.slices}" * (self.slices > 1) + "-transposed" * self.transposed
        return f"{self.m}x{self.n}x{self.k}-w{self.warps}-s{self.stages}-g{self.group}{extras}"


@lru_cache(maxsize=16)
def gpu_family(device: torch.device) -> str:
    """One of `FAMILIES`: the tiles that go with a device."""
    if INTERPRETED.value or device.type != "cuda":
        return "interpreted"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "ampere", 9: "hopper", 10: "blackwell", 11: "blackwell"}.get(major, "blackwell_small")


@triton.jit
def grouped_tile(index, rows, columns, GROUP: tl.constexpr):
    """Row and column of the tile with this number, of a result of rows x columns tiles."""
    per_group = GROUP * columns
    first = (index // per_group) * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + (index % per_group) % height, (index % per_group) // height


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """An fp32 block rounded once, half to even, to a float type."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The carry of the rounding would turn some NaN into zero.
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dot_floats(a, b, acc):
    """The fp32 block acc + a @ b of blocks of one float type; fp32 is multiplied as it is, never as TF32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def codes_to_float(codes, dtype: tl.constexpr):
    """A block of int8 as a float type: exact for every int8 in bf16, fp16 and fp32."""
    if INTERPRETED:
        return round_to(codes.to(tl.float32), dtype)
    else:
        return codes.to(dtype)
