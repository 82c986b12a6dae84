"""Sums of magnitudes whose bits depend on neither the order of the terms nor on how they are split over ranks.

A part's scale is the mean of |w| over all of it, while the part may be sharded over ranks, fragments and chunks.
Floating sums round differently in every order, fp64 included (1, 2^-24 and 1024 times 2^-62). So terms become integers:

    e = least integer with max|w| < 2^e          (the maximum over the WHOLE part: an all-reduce MAX)
    u = 2^(e + ceil(log2 count) - 62)            (the unit; `count` terms can then never exceed 2^62)
    total = sum of rint(|w| / u)                 (int64, exact in every order: an all-reduce SUM)
    mean = total * u / count                     (one conversion to floating point)

|w| / u is exact in fp64, as u is a power of two and fp32 has 24 significant bits; so each term is off by at most u/2,
which is 2^-62 of the largest possible sum. Everything is vectorised over parts: a caller with many layers stacks
their maxima, counts and totals in 1-D tensors and pays for one MAX and one SUM altogether.

The same sum serves the 4-bit activation scale, one "part" per token.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SCALE_FLOOR = 1e-5
"""Lower bound of weight and activation scales: keeps 1/scale finite for all-zero parts and tokens."""

_CHUNK_ELEMENTS = 1 << 18
_SUM_BITS, _EXACT_BITS = 62, 53
_LONGEST_RUN = 1 << 12


def row_slices(t: Tensor) -> Iterator[slice]:
    """Cut dim 0 of `t` into slices of about 2^18 elements, so that temporaries stay in a cache."""
    rows, elements = t.shape[0], t.numel()
    step = max(1, _CHUNK_ELEMENTS * rows // elements) if elements else max(1, rows)
    for start in range(0, rows if elements else 0, step):
        yield slice(start, start + step)


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent in fp64, exactly, for int64 exponents in [-1022, 1023].

    Assembled from bits: `torch.exp2` and `torch.pow` promise no exact result, and `torch.ldexp` goes through fp32.
    """
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def part_abs_max(w_part: Tensor) -> Tensor:
    """Return max|w| of this rank's piece of a part, an fp32 scalar; 0 for an empty piece.

    NaN comes back as +Inf, because MAX reductions of some communication libraries drop NaN: after the all-reduce
    `unit_exponent` then refuses the part on every rank alike. With a survivors' mask the maximum is the same, since
    every group keeps its largest magnitude.
    """
    if not w_part.numel():
        return torch.zeros((), dtype=torch.float32, device=w_part.device)
    least, most = torch.aminmax(w_part)  # NaN if there is one
    return torch.nan_to_num(torch.maximum(most, -least).float(), nan=torch.inf, posinf=torch.inf)


def unit_exponent(abs_max: Tensor, count: Tensor | int) -> Tensor:
    """Return log2 of the unit of the fixed-point sum, int64, of the shape of `abs_max` (and `count`).

    Args:
        abs_max: fp32, the maximum magnitude of each whole part (after the all-reduce).
        count: number of terms of each whole part, an int or an int64 tensor that broadcasts.

    Raises:
        ValueError: a maximum is NaN or Inf, or a count is below 1.
    """
    if not bool(abs_max.isfinite().all()):
        raise ValueError("weights hold NaN or Inf: a scale cannot be computed from them")
    counts = torch.as_tensor(count, dtype=torch.int64, device=abs_max.device)
    if bool((counts < 1).any()):
        raise ValueError(f"count must be at least 1 for a mean, got {counts.min().item()}")
    return _unit_exponent(abs_max, counts)


def _unit_exponent(abs_max: Tensor, counts: Tensor) -> Tensor:
    """As `unit_exponent`, unchecked. frexp gives x = f * 2^e with 0.5 <= f < 1: just the e with x < 2^e.

    fp64, so that fp32 subnormals are normal numbers; and the exponent of count - 1 is ceil(log2 count).
    """
    exponent = torch.frexp(abs_max.double()).exponent.to(torch.int64)
    return exponent + torch.frexp((counts - 1).double()).exponent.to(torch.int64) - _SUM_BITS


def fixed_point_sum(w_part: Tensor, unit: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return sum of rint(|w| / 2^unit) over this rank's piece of a part, an int64 scalar: add it up over ranks.

    Args:
        w_part: any shape and float dtype, possibly empty.
        unit: int64 scalar from `unit_exponent` of the whole part, equal on every rank.
        mask: bool of the shape of `w_part`; where it is False a term counts as 0.

    Raises:
        ValueError: `mask` has another shape.
    """
    if mask is not None and mask.shape != w_part.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, the weights have {tuple(w_part.shape)}")
    scale = power_of_two(-unit)
    total = torch.zeros((), dtype=torch.int64, device=w_part.device)
    for rows in row_slices(w_part):
        terms = w_part[rows].float().double().abs_().mul_(scale).round_()
        if mask is None:
            total += _sum_of_terms(terms.flatten(), w_part.numel())
        else:
            total += terms.mul_(mask[rows]).to(torch.int64).sum()
    return total


def _sum_of_terms(terms: Tensor, least_count: int) -> Tensor:
    """Sum of fp64 integers, int64. Each is at most 2^62 / count: short runs have sums that fp64 holds, in any order."""
    run = min(1 << max(0, (least_count - 1).bit_length() - (_SUM_BITS - _EXACT_BITS)), _LONGEST_RUN)
    whole = len(terms) // run * run
    return terms[:whole].view(-1, run).sum(dim=1).to(torch.int64).sum() + terms[whole:].to(torch.int64).sum()


def gamma_from_fixed_point(total: Tensor, unit: Tensor, count: Tensor | int) -> Tensor:
    """Return max(total * 2^unit / count, 1e-5) in fp32, elementwise over parts.

    Args:
        total: int64, the fixed-point sum of each whole part (after the all-reduce).
        unit: int64, from `unit_exponent`.
        count: as given to `unit_exponent`.
    """
    counts = torch.as_tensor(count, dtype=torch.int64, device=total.device)
    mean = total.double() / counts.double() * power_of_two(unit)
    return mean.float().clamp(min=SCALE_FLOOR)


def row_abs_mean(x: Tensor) -> Tensor:
    """Return mean|x| over the last dimension, fp32 [...]; rows with NaN or Inf give NaN.

    The sum is the fixed-point one with a unit per row, because a floating sum over a row may be split differently
    for different numbers of rows, and then equal tokens would get unequal scales.
    """
    flat = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)  # [tokens, in]
    means = torch.empty(flat.shape[0], dtype=torch.float32, device=x.device)
    counts = torch.tensor(x.shape[-1], dtype=torch.int64, device=x.device)
    for rows in row_slices(flat):
        magnitudes = flat[rows].float().abs().double()
        abs_max = magnitudes.amax(dim=-1)
        finite = abs_max.isfinite()
        unit = _unit_exponent(abs_max.where(finite, 0.0), counts)
        terms = magnitudes.mul_(power_of_two(-unit).unsqueeze(-1)).round_().nan_to_num_(0.0, 0.0)
        mean = terms.to(torch.int64).sum(dim=-1).double() / counts.double() * power_of_two(unit)
        means[rows] = mean.float().where(finite, torch.nan)
    return means.reshape(x.shape[:-1])
