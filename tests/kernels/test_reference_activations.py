"""Activations, exact integer GEMMs and their scaling: against numpy's int64 and IEEE fp32."""

import math
from fractions import Fraction

import numpy as np
import pytest
import sbn_kernels as kernels
import torch
from same_bits import assert_same_bits
from sbn_kernels import TernaryWeight, reference

pytest.importorskip("hypothesis")  # `make gpu` runs these tests with PyTorch, Triton and pytest alone
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("each_backend")

BIGGEST = float(np.finfo(np.float32).max)
FAST = settings(deadline=None, max_examples=150)
VALUES = st.one_of(
    st.sampled_from(
        [0.0, -0.0, float(np.float32(1e-5)), 2.0**-18, 2.0**-149, BIGGEST, -BIGGEST, 0.5, -1.0, 127.0, 63.5]
    ),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
F32 = np.float32


def int_matmul(x_q: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return kernels.int_matmul(x_q, TernaryWeight(codes, torch.ones(len(codes))))


def codes_by_definition(row: list[float], r: np.float32, low: int, high: int) -> list[int]:
    return [int(max(low, min(high, float(np.rint(F32(v) * r))))) for v in row]


@FAST
@given(st.lists(st.lists(VALUES, min_size=5, max_size=5), min_size=1, max_size=4))
def test_eight_bits_follow_the_definition(rows: list[list[float]]) -> None:
    x_q, s_x = kernels.quantize_activations(torch.tensor(rows))
    assert (x_q.dtype, s_x.dtype, s_x.shape) == (torch.int8, torch.float32, (len(rows),))
    for row, codes, scale in zip(rows, x_q.tolist(), s_x.tolist(), strict=True):
        a = max(max(F32(abs(v)) for v in row), F32(1e-5))
        assert codes == codes_by_definition(row, F32(127) / a, -128, 127)
        assert scale == float(a / F32(127))


@FAST
@given(st.lists(st.lists(VALUES, min_size=5, max_size=5), min_size=1, max_size=4))
def test_four_bits_follow_the_definition(rows: list[list[float]]) -> None:
    x_q, s_x = kernels.quantize_activations(torch.tensor(rows), bits=4)
    for row, codes, scale in zip(rows, x_q.tolist(), s_x.tolist(), strict=True):
        mean = F32(float(max(sum(Fraction(abs(v)) for v in row) / 5, Fraction(float(F32(1e-5))))))
        r = F32(F32(7**0.5) / mean)
        assert codes == codes_by_definition(row, r, -8, 7)
        assert scale == float(F32(1) / r)
        assert -8 <= min(codes) <= max(codes) <= 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_dtypes_shapes_and_strides_do_not_matter(dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(6, 3, 40).to(dtype)
    x_q, s_x = kernels.quantize_activations(x, bits)
    expected = kernels.quantize_activations(x.float().reshape(18, 40), bits)
    assert_same_bits(x_q.reshape(18, 40), expected[0])
    assert_same_bits(s_x.reshape(18), expected[1])
    strided = kernels.quantize_activations(x.transpose(0, 1), bits)
    assert_same_bits(strided, (x_q.transpose(0, 1), s_x.transpose(0, 1)))
    one = kernels.quantize_activations(x[2, 1], bits)
    assert_same_bits(one, (x_q[2, 1], s_x[2, 1]))


@pytest.mark.parametrize("bits", [8, 4])
def test_no_tokens(bits: int) -> None:
    x_q, s_x = kernels.quantize_activations(torch.empty(0, 3, 16), bits)
    assert (x_q.shape, s_x.shape) == ((0, 3, 16), (0, 3))
    y = kernels.ternary_linear(x_q, s_x, TernaryWeight(torch.ones(4, 16, dtype=torch.int8), torch.ones(4)))
    assert y.shape == (0, 3, 4)


@pytest.mark.parametrize("shards", [2, 4])
def test_slices_of_the_input_with_the_common_maximum_have_the_codes_of_the_whole(shards: int) -> None:
    x = torch.randn(5, 64).bfloat16()
    x_q, s_x = kernels.quantize_activations(x)
    pieces = x.chunk(shards, dim=-1)
    abs_max = torch.stack([kernels.activation_abs_max(p) for p in pieces]).amax(0)
    quantized = [kernels.quantize_activations(p, abs_max=abs_max) for p in pieces]
    assert_same_bits(torch.cat([q for q, _ in quantized], dim=-1), x_q)
    assert_same_bits([s for _, s in quantized], [s_x] * shards)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_token_is_nan_and_no_other(bits: int, bad: float) -> None:
    x = torch.randn(3, 16)
    clean_q, clean_s = kernels.quantize_activations(x, bits)
    x[1, 5] = bad
    x_q, s_x = kernels.quantize_activations(x, bits)
    assert not x_q[1].any()
    assert s_x.isnan().tolist() == [False, True, False]
    assert_same_bits(x_q[::2], clean_q[::2])
    assert_same_bits(s_x[::2], clean_s[::2])
    y = kernels.ternary_linear(x_q, s_x, TernaryWeight(torch.zeros(4, 16, dtype=torch.int8), torch.ones(4)))
    assert y.isnan().all(dim=1).tolist() == [False, True, False]
    assert y[::2].isfinite().all()


def test_a_bad_value_in_another_slice_makes_the_token_nan_here() -> None:
    left, right = torch.ones(2, 8), torch.ones(2, 8)
    right[0, 3] = math.nan
    abs_max = torch.maximum(kernels.activation_abs_max(left), kernels.activation_abs_max(right))
    assert abs_max.tolist() == [math.inf, 1.0]
    assert kernels.quantize_activations(left, abs_max=abs_max)[1].isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (torch.ones(2, 8), {"bits": 7}, "bits must be 8 or 4, got 7"),
        (torch.ones(2, 8), {"bits": 4, "abs_max": torch.ones(2)}, "abs_max goes with 8 bits"),
        (torch.ones(2, 8), {"abs_max": torch.ones(3)}, "abs_max has shape"),
        (torch.ones(2, 0), {}, "in >= 1"),
        (torch.ones(2, 0), {"bits": 4}, "in >= 1"),
    ],
)
def test_bad_activation_arguments_are_named(x: torch.Tensor, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernels.quantize_activations(x, **arguments)


@FAST
@given(st.lists(st.lists(VALUES, min_size=4, max_size=4), min_size=1, max_size=4))
def test_gradient_rows_are_within_half_a_step(rows: list[list[float]]) -> None:
    t = torch.tensor(rows)
    t_q, s = reference.quantize_rows(t)
    assert int(t_q.min()) >= -127
    error = (t.double() - t_q.double() * s.double().unsqueeze(-1)).abs()
    assert (error <= s.double().unsqueeze(-1) * 0.5001).all()


def test_tiny_gradients_keep_their_bits() -> None:
    t = torch.randn(4, 64)
    for exponent in (-80, -20, 60):
        assert_same_bits(reference.quantize_rows(t * 2.0**exponent)[0], reference.quantize_rows(t)[0])


@pytest.mark.parametrize("width", [1, 7, 896, 4864, 131072])
def test_ternary_products_are_exact(width: int) -> None:
    rng = np.random.default_rng(width)
    x_q = rng.integers(-128, 128, (3, width)).astype(np.int8)
    codes = rng.integers(-1, 2, (5, width)).astype(np.int8)
    x_q[0], codes[0], codes[1] = -128, 1, -1
    expected = x_q.astype(np.int64) @ codes.astype(np.int64).T
    acc = int_matmul(torch.from_numpy(x_q), torch.from_numpy(codes))
    assert acc.dtype == torch.float32
    np.testing.assert_array_equal(acc.numpy().astype(np.int64), expected)
    halves = [
        int_matmul(torch.from_numpy(x_q[:, part]), torch.from_numpy(codes[:, part]))
        for part in (slice(0, width // 3), slice(width // 3, None))
    ]
    assert_same_bits(halves[0] + halves[1], acc)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_reduced_precision_modes_do_not_reach_integers(precision: str) -> None:
    x_q = torch.randint(-128, 128, (4, 4096), dtype=torch.int8)
    codes = torch.randint(-1, 2, (8, 4096), dtype=torch.int8)
    expected = x_q.long() @ codes.long().t()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            acc = int_matmul(x_q, codes)
            product = reference.int8_matmul(x_q.clamp(min=-127), x_q)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same_bits(acc.long(), expected)
    assert_same_bits(product.long(), x_q.clamp(min=-127).long() @ x_q.long().t())


@pytest.mark.parametrize("length", [1, 1023, 1025, 5000])
def test_int8_products_are_exact(length: int) -> None:
    rng = np.random.default_rng(length)
    a, b = rng.integers(-127, 128, (3, length)), rng.integers(-128, 128, (4, length))
    a[0], b[0] = 127, -128
    product = reference.int8_matmul(torch.from_numpy(a.astype(np.int8)), torch.from_numpy(b.astype(np.int8)))
    assert product.dtype == torch.int32
    np.testing.assert_array_equal(product.numpy(), a @ b.T)


def test_products_that_could_round_are_refused() -> None:
    wide = torch.zeros(1, 131073, dtype=torch.int8)
    for multiply in (int_matmul, reference.int8_matmul):
        with pytest.raises(ValueError, match="131073 are not exact: at most 131072"):
            multiply(wide, wide)
        with pytest.raises(ValueError, match="int8 operands"):
            multiply(torch.ones(1, 8), torch.ones(1, 8, dtype=torch.int8))
        with pytest.raises(ValueError, match="do not share their last dimension"):
            multiply(wide, torch.ones(1, 8, dtype=torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_scaling_multiplies_token_first_then_row_and_rounds_once(dtype: torch.dtype, with_bias: bool) -> None:
    rng = np.random.default_rng(3)
    acc = rng.integers(-5000, 5000, (6, 9)).astype(F32)
    s_x, gamma, bias = rng.random(6, F32), rng.random(9, F32), rng.standard_normal(9, F32)
    expected = (acc * s_x[:, None]) * gamma[None, :]
    expected = expected + bias[None, :] if with_bias else expected
    given_acc = torch.from_numpy(acc)
    y = kernels.scale_accumulator(
        given_acc, torch.from_numpy(s_x), torch.from_numpy(gamma), torch.from_numpy(bias) if with_bias else None, dtype
    )
    assert_same_bits(y, torch.from_numpy(expected).to(dtype))
    assert_same_bits(given_acc, torch.from_numpy(acc))
    as_int = kernels.scale_accumulator(given_acc.int(), torch.from_numpy(s_x), torch.from_numpy(gamma))
    assert_same_bits(as_int, torch.from_numpy((acc * s_x[:, None]) * gamma[None, :]))
