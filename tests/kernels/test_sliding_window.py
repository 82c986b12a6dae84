"""Sliding windows: every pattern of 4:6 and 6:8, random 14:16, the exact product, and through the 2:4 formats."""

import itertools

import pytest
import torch
from same_bits import assert_same_bits
from sbn_kernels.formats import two_four
from sbn_kernels.gpu.gemm.sliding_window import (
    expand_activations,
    expand_activations_fast,
    expand_codes,
    expanded_features,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def patterns(m: int) -> torch.Tensor:
    """All ternary groups of m with at most m - 2 non-zeros, [count, m]."""
    every = torch.cartesian_prod(*[torch.tensor([-1, 0, 1], dtype=torch.int8)] * m)
    return every[(every != 0).sum(1) <= m - 2]


def random_codes(rows: int, groups: int, m: int, seed: int) -> torch.Tensor:
    """Codes with exactly m - 2 non-zeros in each group."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, groups, m, generator=generator).argsort(-1)
    signs = torch.randint(0, 2, order.shape, generator=generator) * 2 - 1
    return (signs * (order < m - 2)).to(torch.int8).flatten(1)


def folded(expanded: torch.Tensor, m: int) -> torch.Tensor:
    """Adds every window back where it came from, by loops."""
    back = torch.zeros(expanded.shape[0], expanded.shape[1] // (2 * m - 4) * m, dtype=torch.int64)
    for column in range(expanded.shape[1]):
        group, place = divmod(column, 2 * m - 4)
        back[:, group * m + place // 4 * 2 + place % 4] += expanded[:, column].cpu()
    return back


@pytest.mark.parametrize("m", [4, 6, 8])
def test_every_pattern(m: int) -> None:
    codes = patterns(m)
    expanded = expand_codes(codes.to(DEVICE), m)
    assert expanded.shape == (len(codes), 2 * m - 4)
    assert two_four.is_two_four(expanded)
    assert_same_bits(folded(expanded, m), codes.long())
    assert int((expanded != 0).sum()) == int((codes != 0).sum())


@pytest.mark.parametrize(("m", "groups"), [(4, 4), (6, 3), (8, 112), (8, 608), (16, 20), (32, 5)])
def test_the_product_is_the_same(m: int, groups: int) -> None:
    codes = random_codes(7, groups, m, groups).to(DEVICE)
    x_q = torch.randint(-128, 128, (5, groups * m), dtype=torch.int8, generator=torch.Generator().manual_seed(3))
    x_q = x_q.to(DEVICE)
    wide_codes, wide_x = expand_codes(codes, m), expand_activations(x_q, m)
    assert two_four.is_two_four(wide_codes)
    assert wide_codes.shape[1] == wide_x.shape[1] == expanded_features(groups * m, m) == groups * (2 * m - 4)
    expected = x_q.double() @ codes.double().t()
    assert_same_bits(wide_x.double() @ wide_codes.double().t(), expected)
    assert_same_bits(folded(wide_codes, m), codes.long().cpu())


def test_two_four_is_left_alone() -> None:
    codes = random_codes(3, 9, 4, 0)
    assert_same_bits(expand_codes(codes, 4), codes)


def test_half_as_long_again_for_six_of_eight() -> None:
    assert [expanded_features(width, 8) for width in (896, 4864, 11008)] == [1344, 7296, 16512]


@pytest.mark.parametrize("m", [4, 6, 8, 14, 32])
@pytest.mark.parametrize(("tokens", "groups"), [(0, 3), (1, 1), (17, 3), (3, 200)])
def test_kernel_expands_the_same_bytes(m: int, tokens: int, groups: int) -> None:
    x_q = torch.randint(-128, 128, (tokens, groups * m), dtype=torch.int8).to(DEVICE)
    assert_same_bits(expand_activations_fast(x_q, m), expand_activations(x_q, m))


def test_leading_dimensions() -> None:
    x_q = torch.randint(-128, 128, (2, 3, 16), dtype=torch.int8)
    assert_same_bits(expand_activations(x_q, 8), expand_activations(x_q.flatten(0, 1), 8).view(2, 3, 24))


def test_what_does_not_fit_is_refused() -> None:
    for m in (6, 8):
        for positions in itertools.combinations(range(m), m - 1):
            codes = torch.zeros(1, m, dtype=torch.int8)
            codes[0, list(positions)] = 1
            with pytest.raises(ValueError, match=f"more than {m - 2} non-zeros"):
                expand_codes(codes, m)
    good = torch.zeros(2, 24, dtype=torch.int8)
    for m in (2, 5, 34):
        with pytest.raises(ValueError, match="an even m from 4"):
            expand_codes(good, m)
    for expand in (expand_codes, expand_activations, expand_activations_fast):
        for bad in (good.float(), good[:, :20]):
            with pytest.raises(ValueError, match="windows of 8 take int8"):
                expand(bad, 8)
    with pytest.raises(ValueError, match="contiguous"):
        expand_activations_fast(good.t().contiguous().t(), 8)
