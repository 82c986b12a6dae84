"""Scales of all weights of a model, in two launches (docs/method.md, "Forward"); their codes are weight_prepare's.

    1   max|w| of every part                                    -> the unit of its exact sum (exact_sum)
    2   sum of rint(|w| / unit) of every part, int64            -> gamma, after an all-reduce each

A launch covers any number of matrices through tables of addresses, since a model has hundreds of them and a kernel for
each would be bound by launches. Every part is split into runs of 2^14 elements, each reduced by one block of threads;
maxima and integer sums do not depend on how the runs are put together, so atomics are as exact as any order.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.gpu.primitives.launch import check_device
from sbn_kernels.gpu.primitives.rounding import finite_abs, fixed_point_terms
from sbn_kernels.inspection import Build

_RUN = 1 << 14


@triton.jit
def abs_max_kernel(addresses, counts, parts, maxima, W: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """max|w| of one run into its part's maximum; bit patterns of floats >= 0 are in the order of the floats."""
    run = tl.program_id(0)
    w = tl.load(addresses + run).to(tl.pointer_type(W))
    count = tl.load(counts + run)
    lanes = tl.arange(0, STEP)
    largest = tl.zeros((STEP,), tl.float32)
    for start in range(0, BLOCK, STEP):
        at = start + lanes
        largest = tl.maximum(largest, finite_abs(tl.load(w + at, mask=at < count, other=0.0).to(tl.float32)))
    bits = tl.max(largest.to(tl.int32, bitcast=True), axis=0)
    tl.atomic_max(maxima + tl.load(parts + run), bits)


@triton.jit
def abs_sum_kernel(addresses, counts, parts, units, totals, W: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Sum of rint(|w| / 2^unit) of one run, added to its part's total."""
    run = tl.program_id(0)
    part = tl.load(parts + run)
    w = tl.load(addresses + run).to(tl.pointer_type(W))
    count = tl.load(counts + run)
    unit = tl.load(units + part).to(tl.int32)
    lanes = tl.arange(0, STEP)
    total = tl.zeros((STEP,), tl.int64)
    for start in range(0, BLOCK, STEP):
        at = start + lanes
        total += fixed_point_terms(tl.load(w + at, mask=at < count, other=0.0).to(tl.float32), unit)
    tl.atomic_add(totals + part, tl.sum(total, axis=0))


def element_type(tensors: Sequence[Tensor]) -> tl.dtype:
    """Return the Triton type that all `tensors` share; ValueError if they are not contiguous floats of one type."""
    kinds = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1 or not dtypes <= kinds.keys():
        raise ValueError(f"weights of one launch must share one float type, got {sorted(map(str, dtypes))}")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("weights must be contiguous: their rows are read by address")
    return kinds[dtypes.pop()]


def _runs(parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Address, length and part of every run of at most 2^14 elements, int64 each, on the device."""
    pieces = [(piece, part) for part, ranges in enumerate(parts) for piece in ranges if piece.numel()]
    check_device(*(piece for piece, _ in pieces))
    lengths = torch.tensor([piece.numel() for piece, _ in pieces])
    bases = torch.tensor([piece.data_ptr() for piece, _ in pieces])
    repeats = (lengths + _RUN - 1) // _RUN
    which = torch.arange(len(pieces)).repeat_interleave(repeats)
    first = torch.cat([torch.arange(0, n, _RUN) for n in lengths.tolist()])
    addresses = bases[which] + first * pieces[0][0].element_size()
    counts = (lengths[which] - first).clamp(max=_RUN)
    owners = torch.tensor([part for _, part in pieces])[which]
    device = pieces[0][0].device
    return addresses.to(device), counts.to(device), owners.to(device)


def abs_maxima(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return max|w| of each part, fp32 [parts], NaN as +Inf, 0 for an empty one: `exact_sum.part_abs_max` of many.

    Args:
        parts: each a sequence of contiguous views (row ranges of a weight), all of one float type and device.

    Raises:
        ValueError: views that are not contiguous or of different types; no CUDA tensors.
    """
    pieces = [piece for ranges in parts for piece in ranges]
    element = element_type(pieces)
    maxima = torch.zeros(len(parts), dtype=torch.int32, device=pieces[0].device)
    if any(piece.numel() for piece in pieces):
        addresses, counts, owners = _runs(parts)
        abs_max_kernel[(len(addresses),)](addresses, counts, owners, maxima, W=element, BLOCK=_RUN, STEP=2048)
    return maxima.view(torch.float32)


def fixed_point_sums(parts: Sequence[Sequence[Tensor]], units: Tensor) -> Tensor:
    """Return the exact sum of rint(|w| / 2^unit) of each part, int64 [parts]: `exact_sum.fixed_point_sum` of many.

    Args:
        parts: as for `abs_maxima`, finite.
        units: int64 [parts], from `exact_sum.unit_exponent`.

    Raises:
        ValueError: as `abs_maxima`.
    """
    pieces = [piece for ranges in parts for piece in ranges]
    element = element_type(pieces)
    totals = torch.zeros(len(parts), dtype=torch.int64, device=pieces[0].device)
    if any(piece.numel() for piece in pieces):
        addresses, counts, owners = _runs(parts)
        abs_sum_kernel[(len(addresses),)](addresses, counts, owners, units, totals, W=element, BLOCK=_RUN, STEP=2048)
    return totals


_TABLES = {
    **dict.fromkeys(("addresses", "counts", "parts", "units", "totals"), "*i64"),
    "maxima": "*i32",
}
_RUNS = {"W": tl.float32, "BLOCK": _RUN, "STEP": 2048}
BUILDS: tuple[Build, ...] = (
    Build("weight_sums[maxima]", abs_max_kernel, _TABLES, _RUNS),
    Build("weight_sums[sums]", abs_sum_kernel, _TABLES, _RUNS),
)
