"""What the row kernels share: exact rounding of a token to int8, and exact sums of magnitudes, inside a kernel.

    a = max(max|x|, 1e-5)    x_q = clip(rint(x * (127/a)), low, high)    s = a/127   (reference.quantize_activations)
    term(|x|) = rint(|x| / 2^unit)                                                  (exact_sum.fixed_point_sum)

Divisions are IEEE (`div_rn`), products are not fused with sums (no operation here can be), and rint is the sum with
1.5 * 2^23, whose spacing is 1: half to even, for |x| < 2^22. The fixed-point terms are shifts of the significand, so
that no fp64 is needed, which many GPUs do at 1/64 of the speed.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

SCALE_FLOOR = tl.constexpr(1e-5)
_RINT = tl.constexpr(12582912.0)


@triton.jit
def rint(x):
    """Fp32 block rounded half to even; |x| < 2^22."""
    return (x + _RINT) - _RINT


@triton.jit
def finite_abs(x):
    """|x| of an fp32 block, NaN as +Inf."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def quantize_block(x, a, LOW: tl.constexpr, HIGH: tl.constexpr):
    """(int8 codes of x, s) for fp32 x and magnitudes a that broadcast against it; a not finite: 0 and NaN."""
    good = a < float("inf")
    floored = tl.maximum(tl.where(good, a, 1.0), SCALE_FLOOR)
    r = tl.div_rn(tl.full(floored.shape, 127.0, tl.float32), floored)
    s = tl.div_rn(floored, tl.full(floored.shape, 127.0, tl.float32))
    clean = tl.where(good, tl.where(x == x, x, 0.0), 0.0)
    codes = tl.minimum(tl.maximum(rint(clean * r), LOW), HIGH).to(tl.int8)
    return codes, tl.where(good, s, float("nan"))


@triton.jit
def exponent_above(a):
    """The least e with a < 2^e as int32, of finite fp32 a >= 0; 0 for a = 0, subnormal numbers included."""
    bits = a.to(tl.float64).to(tl.int64, bitcast=True)
    return tl.where(a > 0.0, ((bits >> 52) & 0x7FF).to(tl.int32) - 1022, 0)


@triton.jit
def power_of_two(exponent):
    """2^exponent in fp64, from its bits; exponent in [-1022, 1023]."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def fixed_point_terms(x, unit):
    """rint(|x| / 2^unit) as int64, half to even, of finite fp32 x; the result must be below 2^62."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    exponent = bits >> 23
    significand = tl.where(exponent > 0, (bits & 0x7FFFFF) | 0x800000, bits & 0x7FFFFF).to(tl.int64)
    shift = tl.maximum(exponent, 1) - 150 - unit
    up = tl.maximum(shift, 0).to(tl.int64)
    down = tl.minimum(tl.maximum(-shift, 0), 40).to(tl.int64)
    whole = significand >> down
    rest = significand - (whole << down)
    half = (tl.full(down.shape, 1, tl.int64) << down) >> 1
    odd = (whole & 1) == 1
    carry = (down > 0) & ((rest > half) | ((rest == half) & odd))
    return tl.where(shift > 0, significand << up, whole + carry.to(tl.int64))
