"""Codes at 2 bits in plane order: against a packer that places one code at a time, and the GEMMs that read them."""

import pytest
import torch
from cases import kernel_cases
from operands import DEVICE, ternary_codes
from same_bits import assert_same_bits
from sbn_kernels.formats import planes

SHAPES = [(1, 1), (3, 256), (70, 300), (5, 896), (2, 11008), (130, 17), (4, 0)]


def one_code_at_a_time(codes: torch.Tensor) -> torch.Tensor:
    rows, k = codes.shape
    packed = [[0] * (-(-k // 256) * 64) for _ in range(rows)]
    for row, values in enumerate(codes.tolist()):
        for position, code in enumerate(values):
            block, inside = divmod(position, 256)
            plane, byte = divmod(inside, 64)
            packed[row][block * 64 + byte] |= {0: 0b00, 1: 0b01, -1: 0b11}[code] << (2 * plane)
    return torch.tensor(packed, dtype=torch.uint8, device=DEVICE).view(rows, -1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layout_and_way_back(shape: tuple[int, int]) -> None:
    codes = ternary_codes(*shape)
    packed = planes.pack_planes(codes)
    assert packed.shape == (shape[0], planes.plane_bytes(shape[1]))
    assert_same_bits(packed, one_code_at_a_time(codes))
    assert_same_bits(planes.unpack_planes(packed, shape[1]), codes)


@pytest.mark.parametrize("shape", kernel_cases(SHAPES, [shape for shape in SHAPES if shape != (2, 11008)]), ids=str)
def test_kernel_makes_the_same_bytes(shape: tuple[int, int]) -> None:
    codes = ternary_codes(*shape)
    assert_same_bits(planes.codes_to_planes(codes), planes.pack_planes(codes))
    assert_same_bits(planes.codes_to_planes(codes, transpose=True), planes.pack_planes(codes.t().contiguous()))
    transposed = codes.t().contiguous().t()
    assert_same_bits(planes.codes_to_planes(transposed), planes.pack_planes(codes))


def test_what_does_not_fit_is_named() -> None:
    codes = ternary_codes(3, 300)
    with pytest.raises(ValueError, match="int8 matrix of codes, got torch.float32"):
        planes.pack_planes(codes.float())
    with pytest.raises(ValueError, match=r"got torch.int8 \(300,\)"):
        planes.codes_to_planes(codes[0])
    for bad in (2, -2, -128):
        codes[1, 2] = bad
        with pytest.raises(ValueError, match="values outside"):
            planes.pack_planes(codes)
    with pytest.raises(ValueError, match=r"planes of 300 codes are uint8 \[rows, 128\], got torch.uint8 \(3, 64\)"):
        planes.unpack_planes(torch.zeros(3, 64, dtype=torch.uint8), 300)
