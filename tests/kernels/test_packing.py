"""Packed codes and masks: exact round trips, the documented layout, damaged bytes."""

import numpy as np
import pytest
import sbn_kernels as kernels
import torch
from same_bits import assert_same_bits

pytest.importorskip("hypothesis")  # `make gpu` runs these tests with PyTorch, Triton and pytest alone
from hypothesis import given, settings
from hypothesis import strategies as st

FAST = settings(deadline=None, max_examples=100)
SHAPES = st.tuples(st.integers(0, 5), st.integers(1, 41))


@FAST
@given(SHAPES, st.integers(0, 2**32 - 1))
def test_codes_come_back(shape: tuple[int, int], seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-1, 2, shape).astype(np.int8)
    packed = kernels.pack(torch.from_numpy(codes))
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], -(-shape[1] // 4))
    for row in range(shape[0]):
        for column in range(packed.shape[1] * 4):
            value = int(codes[row, column]) if column < shape[1] else 0
            assert int(packed[row, column // 4]) >> 2 * (column % 4) & 3 == value % 4
    assert_same_bits(kernels.unpack(packed, shape[1]), torch.from_numpy(codes))


@FAST
@given(SHAPES, st.integers(0, 2**32 - 1))
def test_masks_come_back_and_flips_are_counted(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random(shape) < 0.5, rng.random(shape) < 0.5
    packed_a, packed_b = (kernels.pack_mask(torch.from_numpy(mask)) for mask in (a, b))
    np.testing.assert_array_equal(packed_a.numpy(), np.packbits(a, axis=-1, bitorder="little"))
    assert_same_bits(kernels.unpack_mask(packed_a, shape[1]), torch.from_numpy(a))
    assert int(kernels.flip_count(packed_a, packed_b)) == int((a != b).sum())


def test_flips_of_every_byte_value() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    counts = [int(kernels.flip_count(every[i : i + 1], torch.zeros(1, dtype=torch.uint8))) for i in range(256)]
    assert counts == [i.bit_count() for i in range(256)]
    assert int(kernels.flip_count(every, every)) == 0


def test_stacked_and_strided_tensors_pack_along_the_last_dimension() -> None:
    codes = torch.randint(-1, 2, (6, 3, 10), dtype=torch.int8)
    assert_same_bits(kernels.unpack(kernels.pack(codes.transpose(0, 1)), 10), codes.transpose(0, 1))
    mask = codes > 0
    assert_same_bits(kernels.unpack_mask(kernels.pack_mask(mask.transpose(0, 1)), 10), mask.transpose(0, 1))


def test_two_and_one_bits_a_weight() -> None:
    codes = torch.zeros(4, 64, dtype=torch.int8)
    assert kernels.pack(codes).nbytes * 8 == 2 * codes.numel()
    assert kernels.pack_mask(codes == 0).nbytes * 8 == codes.numel()


def test_what_is_no_code_is_refused() -> None:
    for bad in (torch.tensor([[2]], dtype=torch.int8), torch.tensor([[-128]], dtype=torch.int8), torch.ones(1, 4)):
        with pytest.raises(ValueError, match="pack takes int8 codes"):
            kernels.pack(bad)
    for field in range(4):
        with pytest.raises(ValueError, match="bytes are damaged"):
            kernels.unpack(torch.tensor([[2 << 2 * field]], dtype=torch.uint8), 4)


def test_widths_and_dtypes_must_fit() -> None:
    packed = torch.zeros(2, 3, dtype=torch.uint8)
    for unpack, width in ((kernels.unpack, 13), (kernels.unpack, 8), (kernels.unpack_mask, 25)):
        with pytest.raises(ValueError, match=f"{width} columns at"):
            unpack(packed, width)
    with pytest.raises(ValueError, match="pack_mask takes bool"):
        kernels.pack_mask(packed)
    with pytest.raises(ValueError, match="two uint8 tensors of one shape"):
        kernels.flip_count(packed, packed[:1])
