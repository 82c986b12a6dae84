"""Ternary codes below two bits a weight, for storage and for decoding with few tokens. Exact, for all devices.

    trits    5 codes a byte:           byte = sum over i < 5 of (c_i + 1) * 3^i, so 0..242         1.6 bits a weight
    six bit  2:4 codes, 4 in 6 bits:   4 bits say which of 4 are non-zero, 2 bits their signs       1.5 bits a weight
    triples  2:4 codes, 12 in 16 bits: p_0 + 33 * p_1 + 33^2 * p_2 with one of 33 patterns each     1.33 bits a weight

A group of 4 with at most 2 non-zeros is one of 1 + 4 * 2 + 6 * 4 = 33 patterns: log2(33) / 4 = 1.26 bits a weight, so
1.25 bits cannot be lossless, and 33^3 = 35937 <= 2^16 is the closest simple fit.

The field of a group: bit k is set if code k is non-zero; bit 4 if the first non-zero is -1; bit 5 if the second is.
A pattern numbers the valid fields: 4 q + (field >> 4) for the q-th pair of positions in lexicographic order
(0,1) (0,2) (0,3) (1,2) (1,3) (2,3); 24 + 2 k + (field >> 4) for a single non-zero at k; 32 for none.

In a row, six-bit fields lie in two planes, since a plane is read in wide, aligned words: first in/8 bytes of masks
(group 2b in the low half of byte b), then in/16 bytes of signs (groups 4b .. 4b+3 in byte b, low bits first). All three
forms pad the last dimension with code 0.
"""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import pad

TRITS_PER_BYTE = 5
TRIPLE_COLUMNS = 12
"""Codes in one 16-bit word of the form `triples`."""

SIX_BIT_COLUMNS = 32
"""The six-bit form pads to this many codes: 4 bytes of masks, 2 bytes of signs."""

PATTERNS = 33
"""Ternary groups of 4 with at most 2 non-zeros."""

_POWERS = (1, 3, 9, 27, 81)
_NO_PATTERN = 255


def _pattern_fields() -> tuple[int, ...]:
    """The field of each pattern 0 .. 32."""
    pairs = [1 << i | 1 << j | signs << 4 for i, j in itertools.combinations(range(4), 2) for signs in range(4)]
    singles = [1 << k | sign << 4 for k in range(4) for sign in range(2)]
    return (*pairs, *singles, 0)


PATTERN_FIELDS = _pattern_fields()
"""Pattern -> field (see the module's docstring)."""


def _check_codes(codes: Tensor) -> None:
    """Raise ValueError unless `codes` is int8 with values in {-1, 0, 1} only."""
    if codes.dtype != torch.int8 or codes.dim() == 0 or bool(((codes < -1) | (codes > 1)).any()):
        raise ValueError(f"packing takes int8 codes [..., in] in {{-1, 0, 1}}, got {codes.dtype} or values outside")


def _fold(codes: Tensor, multiple: int) -> Tensor:
    """Pad the last dimension with zeros and fold it: [..., ceil(in / multiple), multiple]."""
    return pad(codes, (0, -codes.shape[-1] % multiple)).unflatten(-1, (-1, multiple))


def _check_width(packed: Tensor, width: int, in_features: int) -> None:
    """Raise ValueError unless `packed` is uint8 [..., width]."""
    if packed.dtype != torch.uint8 or packed.dim() == 0 or packed.shape[-1] != width:
        raise ValueError(f"{in_features} columns need uint8 [..., {width}], got {packed.dtype} {tuple(packed.shape)}")


def _cut(codes: Tensor, in_features: int) -> Tensor:
    """Drop the padding [..., >= in] -> [..., in]; ValueError if it holds anything but zeros."""
    if bool((codes[..., in_features:] != 0).any()):
        raise ValueError(f"packed codes hold non-zeros beyond column {in_features}: the bytes are damaged")
    return codes[..., :in_features].contiguous()


def pack_trits(codes: Tensor) -> Tensor:
    """Pack ternary codes int8 [..., in] into uint8 [..., ceil(in/5)], first column in the lowest digit.

    Raises:
        ValueError: not int8, or a value outside {-1, 0, 1}.
    """
    _check_codes(codes)
    digits = (_fold(codes, TRITS_PER_BYTE) + 1).view(torch.uint8)  # [..., bytes, 5]
    packed = digits[..., 0].clone()
    for i in range(1, TRITS_PER_BYTE):
        packed += digits[..., i] * _POWERS[i]
    return packed


def unpack_trits(packed: Tensor, in_features: int) -> Tensor:
    """Unpack uint8 [..., ceil(in/5)] into codes int8 [..., in].

    Raises:
        ValueError: not uint8, a wrong width, a byte above 242, or padding that is not code 0.
    """
    _check_width(packed, -(-in_features // TRITS_PER_BYTE), in_features)
    if bool((packed >= 3**TRITS_PER_BYTE).any()):
        raise ValueError("packed trits hold a byte above 242, which stands for no five codes: the bytes are damaged")
    digits = torch.stack([(packed // power) % 3 for power in _POWERS], dim=-1)
    return _cut(digits.view(torch.int8).flatten(-2) - 1, in_features)


def group_fields(codes: Tensor, columns: int) -> Tensor:
    """Return the field of every group of 4, uint8 [..., g], of 2:4 codes int8 [..., in] padded to `columns`.

    Raises:
        ValueError: not int8, a value outside {-1, 0, 1}, or more than 2 non-zeros in a group.
    """
    _check_codes(codes)
    groups = _fold(codes, columns).flatten(-2).unflatten(-1, (-1, 4))  # [..., g, 4]
    used = groups != 0
    rank = used.cumsum(-1, dtype=torch.int8)
    if bool((rank[..., 3] > 2).any()):
        raise ValueError("codes have more than 2 non-zeros in a group of 4: this form is for 2:4 only")
    field = torch.zeros(groups.shape[:-1], dtype=torch.uint8, device=codes.device)
    for k in range(4):
        field |= used[..., k].to(torch.uint8) << k
        field |= ((groups[..., k] < 0).to(torch.uint8) << 3) << rank[..., k].to(torch.uint8)
    return field


def _field_codes(field: Tensor) -> Tensor:
    """Return the codes int8 [..., 4 g] of valid fields uint8 [..., g]."""
    used = torch.stack([(field >> k) & 1 for k in range(4)], dim=-1)  # [..., g, 4]
    second = used.cumsum(-1) == 2
    negative = torch.where(second, (field >> 5).unsqueeze(-1), (field >> 4).unsqueeze(-1)) & 1
    return (used * (1 - 2 * negative.to(torch.int8))).to(torch.int8).flatten(-2)


def _field_patterns(field: Tensor) -> Tensor:
    """Return the pattern of every field, int64 [..., g]; 255 for fields that stand for no group."""
    table = [_NO_PATTERN] * 64
    for pattern, value in enumerate(PATTERN_FIELDS):
        table[value] = pattern
    return torch.tensor(table, device=field.device)[field.long()]


def pack_six_bit(codes: Tensor) -> Tensor:
    """Pack 2:4 codes int8 [..., in] into uint8 [..., 6 * ceil(in/32)]: 1.5 bits a weight.

    Raises:
        ValueError: not int8, a value outside {-1, 0, 1}, or more than 2 non-zeros in a group of 4.
    """
    field = group_fields(codes, SIX_BIT_COLUMNS)
    masks = field & 15
    signs = field >> 4
    masks = masks[..., 0::2] | masks[..., 1::2] << 4
    signs = signs[..., 0::4] | signs[..., 1::4] << 2 | signs[..., 2::4] << 4 | signs[..., 3::4] << 6
    return torch.cat([masks, signs], dim=-1)


def unpack_six_bit(packed: Tensor, in_features: int) -> Tensor:
    """Unpack uint8 [..., 6 * ceil(in/32)] into codes int8 [..., in].

    Raises:
        ValueError: not uint8, a wrong width, a field that stands for no group, or padding that is not code 0.
    """
    units = -(-in_features // SIX_BIT_COLUMNS)
    _check_width(packed, 6 * units, in_features)
    masks, signs = packed[..., : 4 * units], packed[..., 4 * units :]
    masks = torch.stack([masks & 15, masks >> 4], dim=-1).flatten(-2)
    signs = torch.stack([(signs >> 2 * k) & 3 for k in range(4)], dim=-1).flatten(-2)
    field = masks | signs << 4
    if bool((_field_patterns(field) == _NO_PATTERN).any()):
        raise ValueError("packed six-bit fields hold one that stands for no 2:4 group: the bytes are damaged")
    return _cut(_field_codes(field), in_features)


def pack_triples(codes: Tensor) -> Tensor:
    """Pack 2:4 codes int8 [..., in] into uint8 [..., 2 * ceil(in/12)], low byte first: 1.33 bits a weight.

    Raises:
        ValueError: not int8, a value outside {-1, 0, 1}, or more than 2 non-zeros in a group of 4.
    """
    patterns = _field_patterns(group_fields(codes, TRIPLE_COLUMNS)).unflatten(-1, (-1, 3))
    words = patterns[..., 0] + PATTERNS * patterns[..., 1] + PATTERNS**2 * patterns[..., 2]
    return torch.stack([words & 255, words >> 8], dim=-1).to(torch.uint8).flatten(-2)


def unpack_triples(packed: Tensor, in_features: int) -> Tensor:
    """Unpack uint8 [..., 2 * ceil(in/12)] into codes int8 [..., in].

    Raises:
        ValueError: not uint8, a wrong width, a word above 33^3 - 1, or padding that is not code 0.
    """
    _check_width(packed, 2 * -(-in_features // TRIPLE_COLUMNS), in_features)
    halves = packed.unflatten(-1, (-1, 2)).long()
    words = halves[..., 0] | halves[..., 1] << 8
    if bool((words >= PATTERNS**3).any()):
        raise ValueError("packed triples hold a word above 35936, which stands for no codes: the bytes are damaged")
    patterns = torch.stack([words // PATTERNS**i % PATTERNS for i in range(3)], dim=-1).flatten(-2)
    fields = torch.tensor(PATTERN_FIELDS, dtype=torch.uint8, device=packed.device)
    return _cut(_field_codes(fields[patterns]), in_features)
