"""Triton's maxima and exact sums of many weights at once: the bits of the reference."""

import pytest
import torch
from same_bits import assert_same_bits
from sbn_kernels import exact_sum
from sbn_kernels.gpu.weights import weight_prepare
from sbn_kernels.gpu.weights import weight_sums as kernel
from three_layers import DEVICE, three_layers
from torch import Tensor


def parts_of(made: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """Rows interleaved as in a fused projection, and whole matrices."""
    return [(made[0][:10], made[0][20:70]), (made[0][10:20],), (made[1],), (made[2],), (made[2][:0],)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_maxima_and_sums_have_the_references_bits(dtype: torch.dtype) -> None:
    parts = parts_of(three_layers(dtype))
    maxima = kernel.abs_maxima(parts)
    expected = [torch.stack([exact_sum.part_abs_max(piece) for piece in ranges]).amax() for ranges in parts]
    assert_same_bits(maxima, torch.stack(expected))
    counts = torch.tensor([max(sum(p.numel() for p in ranges), 1) for ranges in parts], device=DEVICE)
    units = exact_sum.unit_exponent(maxima, counts)
    totals = [sum(exact_sum.fixed_point_sum(p, units[i]) for p in ranges) for i, ranges in enumerate(parts)]
    assert kernel.fixed_point_sums(parts, units).tolist() == [int(total) for total in totals]


def test_sums_of_every_size_of_term() -> None:
    """From far below half a unit to far above it, ties between even and odd included."""
    significands = torch.tensor([1.0, 1.5, -1.25, 1.0 + 2.0**-23], dtype=torch.float64)
    w = (significands * 2.0 ** torch.arange(-149.0, 60.0).double().unsqueeze(1)).float().to(DEVICE)
    for unit in (-170, -120, -62, -20, 0, 20):
        units = torch.tensor([unit], device=DEVICE)
        small = w[w.abs() < 2.0 ** min(unit + 50, 127)].contiguous()
        assert int(kernel.fixed_point_sums([(small,)], units)) == int(exact_sum.fixed_point_sum(small, units[0]))


def test_a_part_longer_than_a_run_is_whole() -> None:
    w = torch.randn(5, 9001, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    w[4, 9000] = -7.0
    assert float(kernel.abs_maxima([(w,)])) == 7.0
    unit = exact_sum.unit_exponent(torch.tensor([7.0], device=DEVICE), w.numel())
    assert int(kernel.fixed_point_sums([(w,)], unit)) == int(exact_sum.fixed_point_sum(w, unit[0]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none_come_back_as_infinity(value: float) -> None:
    w = torch.ones(2, 8, device=DEVICE)
    w[1, 3] = value
    assert kernel.abs_maxima([(w[:1],), (w[1:],)]).tolist() == [1.0, torch.inf]
    with pytest.raises(ValueError, match="NaN or Inf"):
        weight_prepare.nm_mask(w, 6, 8)


def test_weights_that_cannot_be_read_by_address_are_refused() -> None:
    w = torch.ones(8, 8, device=DEVICE)
    with pytest.raises(ValueError, match="must be contiguous"):
        kernel.abs_maxima([(w.t()[:, :4],)])
    with pytest.raises(ValueError, match="share one float type"):
        kernel.abs_maxima([(w, w.bfloat16())])
