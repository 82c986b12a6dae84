"""Masks and ternary codes: against loops that follow the definition literally."""

import math

import numpy as np
import pytest
import sbn_kernels as kernels
import torch
from same_bits import assert_same_bits

pytest.importorskip("hypothesis")  # `make gpu` runs these tests with PyTorch, Triton and pytest alone
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("each_backend")

FAST = settings(deadline=None, max_examples=100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, 2.0**-149, -(2.0**-149), 1e38, -1e38])
VALUES = st.one_of(TIED, st.floats(width=32, allow_nan=False, allow_infinity=False))


def mask_by_definition(w: np.ndarray, n: int, m: int) -> np.ndarray:
    """Keep i if #{j: |w_j| > |w_i|} + #{j < i: |w_j| = |w_i|} < n, one weight after another."""
    if n == m:
        return np.ones(w.shape, bool)
    mask = np.zeros(w.shape, bool)
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], m):
            group = [abs(float(v)) for v in w[row, start : start + m]]
            for i, value in enumerate(group):
                rank = sum(other > value for other in group) + sum(other == value for other in group[:i])
                mask[row, start + i] = rank < n
    return mask


def codes_by_definition(w: np.ndarray, gamma: list[float], splits: list[int], mask: np.ndarray) -> np.ndarray:
    """mask * clip(rint(w * (1/gamma)), -1, 1) in numpy's fp32, whose operations round as IEEE 754 says."""
    codes = np.zeros(w.shape, np.int8)
    row = 0
    for scale, rows in zip(gamma, splits, strict=True):
        reciprocal = np.float32(1) / np.float32(scale)
        for _ in range(rows):
            for column in range(w.shape[1]):
                value = float(np.rint(np.float32(w[row, column]) * reciprocal))
                codes[row, column] = int(max(-1.0, min(1.0, value))) if mask[row, column] else 0
            row += 1
    return codes


@st.composite
def weight_cases(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    m = draw(st.integers(1, 32))
    n = draw(st.integers(1, m))
    rows, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    values = draw(st.lists(VALUES, min_size=rows * groups * m, max_size=rows * groups * m))
    return torch.tensor(values).reshape(rows, groups * m), n, m


@FAST
@given(weight_cases())
def test_mask_follows_the_rank_formula(case: tuple[torch.Tensor, int, int]) -> None:
    w, n, m = case
    mask = kernels.nm_mask(w, n, m)
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask.numpy(), mask_by_definition(w.numpy(), n, m))
    assert (mask.unflatten(1, (-1, m)).sum(-1) == n).all()


@pytest.mark.parametrize("m", range(1, 33))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_group_size_with_ties_in_every_dtype(m: int, dtype: torch.dtype) -> None:
    w = torch.randn(3, 4 * m, generator=torch.Generator().manual_seed(m)).mul(2).round().div(2).to(dtype)
    for n in sorted({1, (m + 1) // 2, max(1, m - 1), m}):
        np.testing.assert_array_equal(kernels.nm_mask(w, n, m).numpy(), mask_by_definition(w.float().numpy(), n, m))


def test_ties_keep_the_lower_index() -> None:
    w = torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, -0.0, 0.0, 0.0]])
    assert kernels.nm_mask(w, 2, 4).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
    assert kernels.nm_mask(w, 3, 8).int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]


def test_large_and_non_contiguous_weights_equal_a_stable_sort() -> None:
    w = torch.randn(2048, 1100, generator=torch.Generator().manual_seed(0)).mul(8).round().t()
    assert not w.is_contiguous()
    order = np.argsort(-np.abs(w.numpy()).reshape(1100, -1, 8), axis=-1, kind="stable")
    expected = np.zeros(order.shape, bool)
    np.put_along_axis(expected, order[..., :6], True, axis=-1)
    np.testing.assert_array_equal(kernels.nm_mask(w, 6, 8).numpy(), expected.reshape(1100, -1))


def test_no_sparsity_keeps_everything_at_any_width() -> None:
    assert kernels.nm_mask(torch.zeros(2, 13), 8, 8).all()
    assert kernels.nm_mask(torch.zeros(0, 16), 6, 8).shape == (0, 16)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (1, 33), (-1, 4), (0, 0)])
def test_impossible_sparsity_is_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"sparsity {n}:{m} is not N:M"):
        kernels.nm_mask(torch.ones(1, 32), n, m)


def test_groups_must_tile_the_row() -> None:
    with pytest.raises(ValueError, match="in_features 12 is not a multiple of M = 8"):
        kernels.nm_mask(torch.ones(1, 12), 6, 8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("nm", [(6, 8), (8, 8)])
def test_nan_and_inf_are_refused(bad: float, nm: tuple[int, int]) -> None:
    w = torch.ones(4, 16)
    w[3, 15] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        kernels.nm_mask(w, *nm)
    with pytest.raises(ValueError, match="NaN or Inf"):
        kernels.ternary_codes(w, *nm)
    with pytest.raises(ValueError, match="NaN or Inf"):
        kernels.codes_from_gamma(w, torch.ones(4), *nm, mask=torch.ones(4, 16, dtype=torch.bool))


def test_weights_must_be_a_float_matrix() -> None:
    for w in (torch.ones(8), torch.ones(2, 8, dtype=torch.int8)):
        with pytest.raises(ValueError, match=r"float \[out, in\] matrix"):
            kernels.nm_mask(w, 6, 8)


@FAST
@given(weight_cases(), st.sampled_from(["latent", "quantized"]))
def test_codes_follow_the_definition(case: tuple[torch.Tensor, int, int], mask_source: str) -> None:
    w, n, m = case
    splits = [1] * w.shape[0]
    codes, gamma = kernels.ternary_codes(w, n, m, splits, mask_source=mask_source)
    assert codes.dtype == torch.int8
    assert gamma.shape == (w.shape[0],)
    everything = np.ones(w.shape, bool)
    unmasked = codes_by_definition(w.numpy(), gamma.tolist(), splits, everything)
    mask = mask_by_definition(w.numpy() if mask_source == "latent" else unmasked, n, m)
    np.testing.assert_array_equal(codes.numpy(), codes_by_definition(w.numpy(), gamma.tolist(), splits, mask))


@FAST
@given(weight_cases())
def test_mask_then_quant_scales_by_the_survivors(case: tuple[torch.Tensor, int, int]) -> None:
    w, n, m = case
    codes, gamma = kernels.ternary_codes(w, n, m, order="mask_then_quant")
    mask = mask_by_definition(w.numpy(), n, m)
    mean = math.fsum(np.abs(w.numpy()[mask]).tolist()) / int(mask.sum())
    assert gamma.item() == pytest.approx(max(mean, 1e-5), rel=2**-23)
    np.testing.assert_array_equal(codes.numpy(), codes_by_definition(w.numpy(), gamma.tolist(), [w.shape[0]], mask))


def test_fused_rows_have_the_scales_of_their_own_matrix() -> None:
    q, k, v = torch.randn(16, 64), 5 * torch.randn(4, 64), 0.1 * torch.randn(4, 64)
    codes, gamma = kernels.ternary_codes(torch.cat([q, k, v]), 6, 8, [16, 4, 4])
    alone = [kernels.ternary_codes(w, 6, 8) for w in (q, k, v)]
    assert_same_bits(gamma, torch.cat([g for _, g in alone]))
    assert_same_bits(codes, torch.cat([c for c, _ in alone]))
    assert kernels.gamma_rows(gamma, [16, 4, 4]).tolist() == [gamma[0]] * 16 + [gamma[1]] * 4 + [gamma[2]] * 4


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_of_rows_and_of_columns_have_the_codes_of_the_whole(shards: int) -> None:
    w = torch.randn(32, 64)
    codes, gamma = kernels.ternary_codes(w, 6, 8)
    for dim in (0, 1):
        pieces = [kernels.codes_from_gamma(p, gamma.expand(p.shape[0]), 6, 8)[0] for p in w.chunk(shards, dim)]
        assert_same_bits(torch.cat(pieces, dim), codes)


def test_a_given_mask_is_used_as_it_is() -> None:
    w = torch.randn(8, 32).sign() * (torch.rand(8, 32) + 0.1)  # none of which rounds to zero
    kept = torch.rand(8, 32) < 0.3
    codes, mask = kernels.codes_from_gamma(w, torch.full((8,), 1e-3), 2, 4, mask=kept)
    assert mask is kept
    assert_same_bits(codes, (w.sign() * kept).to(torch.int8))


def test_half_rounds_to_even() -> None:
    w = torch.tensor([[0.5, -0.5, 1.5, -1.5, 0.5000001, 2.5]])
    assert kernels.codes_from_gamma(w, torch.ones(1), 6, 6)[0].tolist() == [[0, 0, 1, -1, 1, 1]]


def test_zero_weights_have_zero_codes() -> None:
    codes, gamma = kernels.ternary_codes(torch.zeros(4, 8), 6, 8)
    assert not codes.any()
    assert gamma.item() == float(np.float32(1e-5))


def test_low_precision_weights_are_converted_first() -> None:
    w = torch.randn(16, 64).bfloat16()
    codes, gamma = kernels.ternary_codes(w, 6, 8)
    expected = kernels.ternary_codes(w.float(), 6, 8)
    assert_same_bits((codes, gamma), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": [3, 4]}, "splits .3, 4. must be positive row counts that add up to out_features 8"),
        ({"splits": [9, -1]}, "splits .9, -1. must be positive"),
        ({"order": "both"}, "order 'both' is not one of"),
        ({"mask_source": "x"}, "mask_source 'x' is not one of"),
        ({"order": "mask_then_quant", "mask_source": "quantized"}, "needs mask_source 'latent'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.ternary_codes(torch.ones(8, 8), 6, 8, **arguments)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="gamma_per_row has shape"):
        kernels.codes_from_gamma(torch.ones(8, 8), torch.ones(1), 6, 8)
    with pytest.raises(ValueError, match="mask has shape"):
        kernels.codes_from_gamma(torch.ones(8, 8), torch.ones(8), 6, 8, mask=torch.ones(1, 8, dtype=torch.bool))
