"""Scales whose bits depend on neither order nor sharding: against exact rational arithmetic."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import sbn_kernels as kernels
import torch
from sbn_kernels.exact_sum import power_of_two, row_abs_mean

pytest.importorskip("hypothesis")  # `make gpu` runs these tests with PyTorch, Triton and pytest alone
from hypothesis import given, settings
from hypothesis import strategies as st

BIGGEST = float(np.finfo(np.float32).max)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALL = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-24, 2.0**-62, 2.0**-149, -(2.0**-126), 2.0**126, BIGGEST, 0.75])
WEIGHTS = st.lists(st.one_of(FLOATS, SMALL), min_size=1, max_size=40)
FAST = settings(deadline=None, max_examples=150)


def unit_by_hand(values: list[float], count: int) -> int:
    largest = max(abs(v) for v in values)
    return (math.frexp(largest)[1] if largest else 0) + (count - 1).bit_length() - 62


def total_by_hand(values: list[float], unit: int) -> int:
    return sum(round(Fraction(abs(v)) / Fraction(2) ** unit) for v in values)


def fp32_step(value: float) -> Fraction:
    """Distance between neighbouring fp32 numbers at `value`."""
    return Fraction(2) ** max(math.frexp(value)[1] - 24, -149)


def scale_of(shards: list[torch.Tensor]) -> tuple[int, torch.Tensor]:
    """What ranks do together: MAX of the maxima, then SUM of the sums."""
    count = sum(shard.numel() for shard in shards)
    unit = kernels.unit_exponent(torch.stack([kernels.part_abs_max(s) for s in shards]).amax(), count)
    total = torch.stack([kernels.fixed_point_sum(s, unit) for s in shards]).sum()
    return int(total), kernels.gamma_from_fixed_point(total, unit, count)


@FAST
@given(WEIGHTS)
def test_sum_is_that_of_exact_rationals(values: list[float]) -> None:
    w = torch.tensor(values)
    unit = kernels.unit_exponent(kernels.part_abs_max(w), len(values))
    assert int(unit) == unit_by_hand(values, len(values))
    total = kernels.fixed_point_sum(w, unit)
    assert total.dtype == torch.int64
    assert int(total) == total_by_hand(values, int(unit))
    assert 0 <= int(total) <= 2**62


@pytest.mark.parametrize("count", [1, 2, 511, 512, 513, 1025, 4095, 9001, (1 << 18) + 7, 1 << 21, (1 << 21) + 4099])
def test_sums_of_the_largest_terms_are_exact(count: int) -> None:
    """All terms as large as a part of so many can have them, in one piece and as the first half of the part."""
    w = torch.full((count,), 1.0 - 2.0**-24)
    unit = kernels.unit_exponent(kernels.part_abs_max(w), count)
    term = round(Fraction(1.0 - 2.0**-24) / Fraction(2) ** int(unit))
    assert int(kernels.fixed_point_sum(w, unit)) == count * term
    half = w[: count // 2]
    assert int(kernels.fixed_point_sum(half, unit)) == len(half) * term
    w[::3] = 2.0**-20 + 2.0**-43
    small = round(Fraction(2.0**-20 + 2.0**-43) / Fraction(2) ** int(unit))
    assert int(kernels.fixed_point_sum(w.view(count, 1), unit)) == len(w[::3]) * small + (count - len(w[::3])) * term


@FAST
@given(WEIGHTS, st.randoms(use_true_random=False))
def test_every_order_and_every_sharding_gives_the_same_bits(values: list[float], random: object) -> None:
    whole = scale_of([torch.tensor(values)])
    shuffled = list(values)
    random.shuffle(shuffled)
    cuts = sorted(random.choices(range(len(values) + 1), k=3))
    bounds = [0, *cuts, len(values)]
    shards = [torch.tensor(shuffled[a:b], dtype=torch.float32) for a, b in pairwise(bounds)]
    total, gamma = scale_of(shards)
    assert total == whole[0]
    assert gamma.view(torch.int32).item() == whole[1].view(torch.int32).item()


@FAST
@given(WEIGHTS)
def test_gamma_is_the_mean_to_half_a_unit_in_the_last_place(values: list[float]) -> None:
    _, gamma = scale_of([torch.tensor(values)])
    exact = max(sum(Fraction(abs(v)) for v in values) / len(values), Fraction(float(np.float32(1e-5))))
    step = fp32_step(gamma.item())
    assert gamma.dtype == torch.float32
    assert abs(Fraction(gamma.item()) - exact) <= step * Fraction(501, 1000)


def test_terms_that_break_fp64_summation() -> None:
    values = [1.0, 2.0**-24, *[2.0**-62] * 1024]
    forward, backward = torch.tensor(values), torch.tensor(values[::-1])
    assert math.fsum(values) == 1.0 + 2.0**-24 + 2.0**-52
    running = [0.0, 0.0]
    for a, b in zip(values, values[::-1], strict=True):
        running[0] += a
        running[1] += b
    assert running[0] != running[1]  # so the example does break a plain fp64 sum
    assert scale_of([forward]) == scale_of([backward]) == scale_of([forward[:7], backward[:-7]])


@pytest.mark.parametrize("count", [1, 2, 3, 1023, 1024, 1025])
@pytest.mark.parametrize("value", [2.0**-149, 1e-38, 1.0, float(np.nextafter(np.float32(2), np.float32(0))), BIGGEST])
def test_equal_terms_neither_overflow_nor_lose_bits(count: int, value: float) -> None:
    w = torch.full((count,), value)
    total, gamma = scale_of([w])
    assert total == total_by_hand([w[0].item()] * count, unit_by_hand([w[0].item()], count)) < 2**62
    assert gamma.item() == max(w[0].item(), float(np.float32(1e-5)))


def test_zero_weights_give_the_floor() -> None:
    assert scale_of([torch.zeros(3, 5), torch.empty(0, 5)])[1].item() == float(np.float32(1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_chunks_do_not_show(dtype: torch.dtype) -> None:
    w = torch.randn(1500, 1024, generator=torch.Generator().manual_seed(1)).to(dtype)
    total, gamma = scale_of([w])
    assert (total, gamma) == scale_of([w.t()])
    assert (total, gamma) == scale_of([w.flatten()[:777], w.flatten()[777:]])
    exact = math.fsum(w.float().abs().flatten().tolist()) / w.numel()
    assert gamma.item() == float(np.float32(exact))


def test_many_parts_at_once_equal_each_alone() -> None:
    parts = [torch.randn(n, 8) * 10.0**k for n, k in ((3, 0), (17, -30), (1, 20))]
    maxima = torch.stack([kernels.part_abs_max(p) for p in parts])
    counts = torch.tensor([p.numel() for p in parts])
    units = kernels.unit_exponent(maxima, counts)
    totals = torch.stack([kernels.fixed_point_sum(p, u) for p, u in zip(parts, units, strict=True)])
    gammas = kernels.gamma_from_fixed_point(totals, units, counts)
    assert gammas.tolist() == [scale_of([p])[1].item() for p in parts]


def test_mask_selects_the_terms() -> None:
    w = torch.randn(6, 16)
    mask = kernels.nm_mask(w, 2, 4)
    gamma = kernels.weight_scales(w, [4, 2], mask)
    expected = [scale_of([w[rows][mask[rows]]])[1].item() for rows in (slice(0, 4), slice(4, 6))]
    assert gamma.tolist() == expected
    assert kernels.weight_scales(w, [4, 2]).tolist() == [scale_of([w[:4]])[1].item(), scale_of([w[4:]])[1].item()]
    with pytest.raises(ValueError, match="mask has shape"):
        kernels.fixed_point_sum(w, torch.tensor(-62), mask[:3])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_reach_every_rank_as_inf_and_are_refused(bad: float) -> None:
    w = torch.ones(4, 4)
    w[1, 2] = bad
    abs_max = kernels.part_abs_max(w)
    assert abs_max.item() == math.inf
    with pytest.raises(ValueError, match="NaN or Inf"):
        kernels.unit_exponent(torch.stack([torch.tensor(1.0), abs_max]), 16)


def test_empty_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="count must be at least 1"):
        kernels.unit_exponent(torch.tensor(0.0), 0)


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-1022, 1024)
    assert power_of_two(exponents).tolist() == [2.0**e for e in range(-1022, 1024)]


@FAST
@given(st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=6))
def test_row_means_do_not_depend_on_the_rows_around(rows: list[list[float]]) -> None:
    x = torch.tensor(rows)
    together = row_abs_mean(x)
    for row, mean in zip(rows, together, strict=True):
        exact = sum(Fraction(abs(v)) for v in row) / 3
        step = fp32_step(mean.item())
        assert abs(Fraction(mean.item()) - exact) <= step * Fraction(501, 1000)
        assert row_abs_mean(torch.tensor(row)).item() == mean.item()
        assert row_abs_mean(torch.tensor(row[::-1])).item() == mean.item()
