"""2:4 packing: by an emulation of the instruction, against PyTorch's own compression, and kernel against PyTorch."""

import itertools

import pytest
import torch
from mma_sp import mma_sp
from operands import DEVICE, TWO_FOUR_GROUPS, two_four_codes
from same_bits import assert_same_bits
from sbn_kernels.formats import two_four
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass


def product(weight: two_four.TwoFourWeight, x_q: torch.Tensor) -> torch.Tensor:
    """x_q @ codes^T through the emulated instruction, fed with the packed registers."""
    b = two_four.activation_fragments(x_q)  # [token tiles, steps, 32, 4]
    a, e = weight.values.cpu(), weight.metadata.cpu()
    zero = torch.zeros(a.shape[0], b.shape[0], a.shape[1], 32, 4, dtype=torch.int32)
    acc = mma_sp(a[:, None], b[None], zero, e[:, None]).sum(2, dtype=torch.int32)
    y = torch.empty(b.shape[0] * 8, a.shape[0] * 16, dtype=torch.int32)
    for lane, i in itertools.product(range(32), range(4)):
        y[lane % 4 * 2 + i % 2 :: 8, lane // 4 + i // 2 * 8 :: 16] = acc[:, :, lane, i].t()
    return y[: x_q.shape[0], : weight.out_features]


@pytest.mark.parametrize(
    ("out", "width", "tokens"), [(16, 64, 8), (1, 4, 1), (17, 100, 9), (33, 896, 17), (2, 11008, 3)]
)
def test_emulated_product_is_the_product(out: int, width: int, tokens: int) -> None:
    codes = two_four_codes(out, width, out, "cpu")
    x_q = torch.randint(-128, 128, (tokens, width), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    y = product(two_four.pack_two_four(codes), x_q)
    assert_same_bits(y.long(), x_q.long() @ codes.long().t())


def test_every_pattern_at_every_place() -> None:
    """All 33 patterns in each of the 16 groups of a step, in rows of different tiles; columns are read one by one."""
    codes = torch.zeros(33 * 16, 64, dtype=torch.int8)
    for place, (pattern, group) in itertools.product(range(16), enumerate(TWO_FOUR_GROUPS)):
        codes[place * 33 + pattern, 4 * place : 4 * place + 4] = torch.tensor(group, dtype=torch.int8)
    y = product(two_four.pack_two_four(codes), torch.eye(64, dtype=torch.int8))
    assert_same_bits(y, codes.t().int())


def test_metadata_is_what_pytorch_makes() -> None:
    """PyTorch's converter for CUTLASS orders metadata for the same instruction, but leaves groups where they are."""
    full = [group for group in TWO_FOUR_GROUPS if group.count(0) == 2]
    codes = two_four_codes(64, 256, 5, "cpu", full)
    grouped = codes.view(64, 4, 4, 4, 4).transpose(2, 3).reshape(64, 256)  # undoes the order of groups of `two_four`
    values, metadata = sparse_semi_structured_from_dense_cutlass(grouped)
    weight = two_four.pack_two_four(codes)
    assert_same_bits(weight.metadata, metadata.view(-1).view(4, 4, 32).transpose(0, 1))
    rows = values.view(4, 2, 8, 4, 2, 4, 4).permute(0, 3, 2, 5, 4, 1, 6).contiguous()
    assert_same_bits(weight.values, rows.view(torch.int32).view(4, 4, 32, 4))


@pytest.mark.parametrize(("out", "width"), [(16, 64), (1, 4), (17, 100), (3, 896), (5, 4864), (50, 512)])
def test_kernel_packs_the_same_bits(out: int, width: int) -> None:
    codes = two_four_codes(out, width, width)
    fast, plain = two_four.pack_two_four_fast(codes), two_four.pack_two_four(codes)
    assert_same_bits(fast.values, plain.values)
    assert_same_bits(fast.metadata, plain.metadata)
    assert (fast.out_features, fast.in_features) == (out, width) == (plain.out_features, plain.in_features)


def test_five_bits_a_weight() -> None:
    weight = two_four.pack_two_four(two_four_codes(32, 128, device="cpu"))
    assert (weight.values.nbytes + weight.metadata.nbytes) * 8 == 5 * 32 * 128


def test_what_does_not_fit_is_refused() -> None:
    three = torch.tensor([[1, 0, 1, -1]], dtype=torch.int8, device=DEVICE)
    assert not two_four.is_two_four(three)
    assert not two_four.is_two_four(three[:, :3])
    for pack in (two_four.pack_two_four, two_four.pack_two_four_fast):
        with pytest.raises(ValueError, match="more than 2 non-zeros"):
            pack(three)
        for bad in (three.float(), three[:, :3], three[0], three[:0]):
            with pytest.raises(ValueError, match="int8"):
                pack(bad)
    with pytest.raises(ValueError, match="contiguous"):
        two_four.pack_two_four_fast(two_four_codes(8, 8).t())
