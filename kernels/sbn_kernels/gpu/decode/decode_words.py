"""Packed ternary codes to bytes, four at a time, in registers: the arithmetic of `decode`, without tables in memory.

A *word* is an int32 whose four bytes are 64 * code (-64 * code for trits), as `dp4a` takes them. A *unit* is what a
packed row consists of; it yields its words one after the other, one for each plane of X:

    KIND 0  two_bit  16 codes, 4 words   a shift puts field k of every byte in its top two bits, where 01 is 64, 11 -64
    KIND 1  trits    20 codes, 5 words   a byte becomes a fraction of 2^14; times 3, its next digit lies above. The
                                         last digit comes first; two bytes share a register
    KIND 2  six_bit  32 codes, 8 words   a product spreads the 4 bits of a mask to 4 bytes, another one the signs
    KIND 3  triples  12 codes, 3 words   / 33 is a product and a shift; pattern -> mask and signs, then as six_bit

Operations for four codes, counted in the source: about 2, 7, 16 and 25, next to one `dp4a` a token.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def load_units(W, S, row, units, here, UNITS: tl.constexpr, KIND: tl.constexpr):
    """Load packed words of rows [rows, 1] and units [1, units]: (words, signs); S is W's memory as int16."""
    if KIND == 2:
        words = tl.load(W + row * (UNITS + UNITS // 2) + units, mask=here, other=0)
        return words, tl.load(S + row * (3 * UNITS) + 2 * UNITS + units, mask=here, other=0)
    else:
        words = tl.load(W + row * UNITS + units, mask=here, other=0)
        return words, words


@triton.jit
def first_registers(words, signs, KIND: tl.constexpr):
    """What decoding a unit carries from word to word: (int32, int32, signs), meaning by format."""
    if KIND == 1:
        # ceil(67.5 * byte) / 2^14 lies in [byte, byte + 1) / 243: its base-3 digits are the byte's, the last one first.
        even = ((words & 0x00FF00FF) * 135 + 0x00010001) >> 1
        odd = (((words >> 8) & 0x00FF00FF) * 135 + 0x00010001) >> 1
        return even & 0x3FFF3FFF, odd & 0x3FFF3FFF, signs
    elif KIND == 3:
        value = words.to(tl.int32) & 0xFFFF
        return value, value, signs
    else:
        return words, words, signs


@triton.jit
def _group_word(mask, first, second):
    """The word of a group of 4: `mask` says which are non-zero, `first` and `second` (-1 or 0) which are negative."""
    low = mask & -mask
    negative = (low & first) | ((mask ^ low) & second)
    # The product puts bit k at bit 8 k, and no two bits on one place.
    return (((mask * 0x00204081) & 0x01010101) << 6) | (((negative * 0x00204081) & 0x01010101) << 7)


@triton.jit
def next_word(a, b, signs, F: tl.constexpr, KIND: tl.constexpr):
    """The F-th word of a unit, and the registers for the next: (word, a, b)."""
    if KIND == 0:
        return (a << (6 - 2 * F)) & -0x3F3F3F40, a, b
    elif KIND == 1:
        a, b = a * 3, b * 3
        # digit * 64 is 0, 64, 128; with bit 6 flipped it is -64 * (digit - 1).
        word = ((b & -0x3FFF4000) | ((a >> 8) & 0x00C000C0)) ^ 0x40404040
        return word, a & 0x3FFF3FFF, b & 0x3FFF3FFF
    elif KIND == 2:
        two = signs.to(tl.int32) >> (2 * F)
        return _group_word((a >> (4 * F)) & 15, -(two & 1), -((two >> 1) & 1)), a, b
    else:
        # Exact for a <= 33^3 - 1; the product is below 2^32.
        quotient = ((a.to(tl.uint32) * 63551) >> 21).to(tl.int32)
        pattern = a - quotient * 33
        pair = (0xCA6953 >> (pattern & 28)) & 15
        single = (1 << (((pattern >> 1) - 12) & 7)) & 15
        mask = tl.where(pattern < 24, pair, single)
        return _group_word(mask, -(pattern & 1), -((pattern >> 1) & 1)), quotient, b


@triton.jit
def place_of(f, PLANES: tl.constexpr, KIND: tl.constexpr):
    """Plane of X that goes with the f-th word of a unit."""
    return PLANES - 1 - f if KIND == 1 else f


@triton.jit
def dot4(a, b, acc, NATIVE: tl.constexpr):
    """acc + the products of four signed bytes, int32 each. The interpreter, without assembly, takes the bytes apart."""
    if NATIVE:
        acc = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            acc += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
    return acc
