"""Codes below two bits a weight: exact round trips, the documented layout by hand, damaged bytes."""

import itertools

import pytest
import torch
from operands import DEVICE, TWO_FOUR_GROUPS, two_four_codes
from same_bits import assert_same_bits
from sbn_kernels.formats import trits

WIDTHS = (1, 4, 5, 12, 17, 31, 32, 33, 896, 4864, 11008)
FORMS = {
    "trits": (trits.pack_trits, trits.unpack_trits),
    "six_bit": (trits.pack_six_bit, trits.unpack_six_bit),
    "triples": (trits.pack_triples, trits.unpack_triples),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", WIDTHS)
def test_codes_come_back(form: str, width: int) -> None:
    pack, unpack = FORMS[form]
    codes = two_four_codes(3, width)
    if form == "trits":
        codes = torch.randint(-1, 2, (3, width), dtype=torch.int8, device=DEVICE)
    assert_same_bits(unpack(pack(codes), width), codes)
    stacked = codes.expand(2, 3, width).transpose(0, 1)
    assert_same_bits(unpack(pack(stacked), width), stacked)
    assert unpack(pack(codes[:0]), width).shape == (0, width)


def test_every_byte_of_trits_by_hand() -> None:
    every = torch.tensor(list(itertools.product((-1, 0, 1), repeat=5)), dtype=torch.int8, device=DEVICE)
    packed = trits.pack_trits(every)
    by_hand = [sum((c + 1) * 3**i for i, c in enumerate(row)) for row in every.tolist()]
    assert packed.flatten().tolist() == by_hand
    assert sorted(by_hand) == list(range(243))
    assert_same_bits(trits.unpack_trits(packed, 5), every)


def field_by_hand(group: tuple[int, ...]) -> int:
    signs = [c < 0 for c in group if c]
    return sum((c != 0) << k for k, c in enumerate(group)) + sum(sign << 4 + i for i, sign in enumerate(signs))


def test_the_33_patterns_by_hand() -> None:
    assert len(TWO_FOUR_GROUPS) == trits.PATTERNS == 33
    every = torch.tensor(TWO_FOUR_GROUPS, dtype=torch.int8, device=DEVICE)
    fields = [field_by_hand(group) for group in TWO_FOUR_GROUPS]
    assert trits.group_fields(every, 4).flatten().tolist() == fields
    assert sorted(trits.PATTERN_FIELDS) == sorted(fields)
    packed = trits.pack_six_bit(every)
    assert [row[0] | row[4] << 4 for row in packed.tolist()] == fields
    words = [row[0] | row[1] << 8 for row in trits.pack_triples(every).tolist()]
    none = trits.PATTERN_FIELDS.index(0)
    assert none == 32
    assert words == [trits.PATTERN_FIELDS.index(field) + 33 * none + 33 * 33 * none for field in fields]
    assert trits.PATTERN_FIELDS[4 * 4 + 3] == 0b111010  # the pair (1, 3), both negative
    assert trits.PATTERN_FIELDS[24 + 2 * 2 + 1] == 0b010100  # position 2 alone, negative


def test_every_damaged_value_is_refused() -> None:
    for value in range(256):
        byte = torch.tensor([[value]], dtype=torch.uint8, device=DEVICE)
        if value < 243:
            assert_same_bits(trits.pack_trits(trits.unpack_trits(byte, 5)), byte)
        else:
            with pytest.raises(ValueError, match="above 242"):
                trits.unpack_trits(byte, 5)
    for field in range(64):
        row = torch.tensor([[field & 15, 0, 0, 0, field >> 4, 0]], dtype=torch.uint8, device=DEVICE)
        if field in trits.PATTERN_FIELDS:
            assert_same_bits(trits.pack_six_bit(trits.unpack_six_bit(row, 32)), row)
        else:
            with pytest.raises(ValueError, match="no 2:4 group"):
                trits.unpack_six_bit(row, 32)
    words = torch.arange(35937, device=DEVICE)
    rows = torch.stack([words & 255, words >> 8], dim=-1).to(torch.uint8)
    assert_same_bits(trits.pack_triples(trits.unpack_triples(rows, 12)), rows)
    for word in (35937, 65535):
        with pytest.raises(ValueError, match="above 35936"):
            trits.unpack_triples(torch.tensor([[word & 255, word >> 8]], dtype=torch.uint8, device=DEVICE), 12)


def test_padding_must_be_zero() -> None:
    full = torch.ones(1, 5, dtype=torch.int8, device=DEVICE)
    with pytest.raises(ValueError, match="beyond column 4"):
        trits.unpack_trits(trits.pack_trits(full), 4)
    pair = torch.tensor([[0] * 8 + [1]], dtype=torch.int8, device=DEVICE)
    with pytest.raises(ValueError, match="beyond column 8"):
        trits.unpack_six_bit(trits.pack_six_bit(pair), 8)
    with pytest.raises(ValueError, match="beyond column 8"):
        trits.unpack_triples(trits.pack_triples(pair), 8)


def test_what_does_not_fit_is_refused() -> None:
    three = torch.tensor([[1, 1, 0, -1]], dtype=torch.int8, device=DEVICE)
    for pack in (trits.pack_six_bit, trits.pack_triples):
        with pytest.raises(ValueError, match="more than 2 non-zeros"):
            pack(three)
    for pack, unpack in FORMS.values():
        for bad in (2, -2, -128, 127):
            with pytest.raises(ValueError, match="in {-1, 0, 1}"):
                pack(torch.full((1, 4), bad, dtype=torch.int8, device=DEVICE))
        with pytest.raises(ValueError, match="in {-1, 0, 1}"):
            pack(torch.ones(1, 4, device=DEVICE))
        with pytest.raises(ValueError, match="64 columns need uint8"):
            unpack(torch.zeros(1, 3, dtype=torch.uint8, device=DEVICE), 64)
