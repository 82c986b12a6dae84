"""Ternary codes at 2 bits and masks at 1 bit, for gathering, keeping and counting.

Both pack along the last dimension, first column in the lowest bits, the last byte padded with zero bits:

    codes: byte b holds columns 4b .. 4b+3, column 4b+k in bits 2k and 2k+1: 00 = 0, 01 = +1, 11 = -1
           (two's complement)
    masks: byte b holds columns 8b .. 8b+7, column 8b+k in bit k

Two's complement, because padding is then the code 0 and a kernel unpacks a field with two shifts. Plain 2-bit fields
instead of 1.6 bits (5 codes a byte), because an unaligned field costs more arithmetic than it saves bytes here.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

_HIGH_BITS = 0xAA


def _pad_last(t: Tensor, multiple: int) -> Tensor:
    """Pad the last dimension with zeros and fold it: [..., ceil(in / multiple), multiple]."""
    return pad(t, (0, -t.shape[-1] % multiple)).unflatten(-1, (-1, multiple))


def pack(codes: Tensor) -> Tensor:
    """Pack ternary codes int8 [..., in] into uint8 [..., ceil(in/4)].

    Raises:
        ValueError: not int8, or a value outside {-1, 0, 1}.
    """
    if codes.dtype != torch.int8 or bool((codes.abs() > 1).any()) or bool((codes == -128).any()):
        raise ValueError(f"pack takes int8 codes in {{-1, 0, 1}}, got {codes.dtype} or values outside")
    fields = _pad_last(codes.view(torch.uint8) & 3, 4)
    return fields[..., 0] | (fields[..., 1] << 2) | (fields[..., 2] << 4) | (fields[..., 3] << 6)


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """Unpack uint8 [..., ceil(in/4)] into codes int8 [..., in].

    Raises:
        ValueError: not uint8, a width that does not go with `in_features`, or a field 10, which is no code.
    """
    _check_packed(packed, in_features, 4)
    if bool(((packed & ~(packed << 1)) & _HIGH_BITS).any()):
        raise ValueError("packed codes hold the field 10, which stands for no code: the bytes are damaged")
    fields = torch.stack([(packed << (6 - 2 * k)).view(torch.int8) >> 6 for k in range(4)], dim=-1)
    return fields.flatten(-2)[..., :in_features].contiguous()


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask [..., in] into uint8 [..., ceil(in/8)].

    Raises:
        ValueError: not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"pack_mask takes bool, got {mask.dtype}")
    bits = _pad_last(mask.view(torch.uint8), 8)
    packed = bits[..., 0].clone()
    for k in range(1, 8):
        packed |= bits[..., k] << k
    return packed


def unpack_mask(packed: Tensor, in_features: int) -> Tensor:
    """Unpack uint8 [..., ceil(in/8)] into a bool mask [..., in].

    Raises:
        ValueError: not uint8, or a width that does not go with `in_features`.
    """
    _check_packed(packed, in_features, 8)
    bits = torch.stack([(packed >> k) & 1 for k in range(8)], dim=-1)
    return bits.flatten(-2)[..., :in_features].bool()


def flip_count(packed_a: Tensor, packed_b: Tensor) -> Tensor:
    """Return the number of bits that differ between two packed masks, an int64 scalar on their device.

    Raises:
        ValueError: not uint8, or different shapes.
    """
    if packed_a.dtype != torch.uint8 or packed_b.dtype != torch.uint8 or packed_a.shape != packed_b.shape:
        raise ValueError(
            f"flip_count takes two uint8 tensors of one shape, got {packed_a.dtype} {tuple(packed_a.shape)} "
            f"and {packed_b.dtype} {tuple(packed_b.shape)}"
        )
    bits = packed_a ^ packed_b
    pairs = bits - ((bits >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(dtype=torch.int64)


def _check_packed(packed: Tensor, in_features: int, per_byte: int) -> None:
    """Raise ValueError unless `packed` is uint8 with ceil(in_features / per_byte) columns."""
    width = -(-in_features // per_byte)
    if packed.dtype != torch.uint8 or packed.dim() == 0 or packed.shape[-1] != width:
        raise ValueError(
            f"{in_features} columns at {per_byte} a byte need uint8 [..., {width}], "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
