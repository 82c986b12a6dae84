"""Triton's masks, codes and planes of many weights at once: the bits of the reference."""

import pytest
import torch
from cases import kernel_cases
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.formats.packing import flip_count, pack_mask
from sbn_kernels.formats.planes import pack_planes
from sbn_kernels.gpu.weights import weight_prepare as kernel
from three_layers import DEVICE, three_layers

SPARSITIES = ((6, 8), (2, 4), (5, 6), (1, 3), (8, 8), (20, 32), (1, 32), (1, 1), (3, 16))
QUICK = ((6, 8), (5, 6), (8, 8))  # a power of two, none, and no mask at all


@pytest.mark.parametrize("source", ["latent", "quantized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nm", kernel_cases(SPARSITIES, QUICK), ids=str)
def test_codes_masks_and_flips_have_the_references_bits(nm: tuple[int, int], dtype: torch.dtype, source: str) -> None:
    made = three_layers(dtype)
    generator = torch.Generator().manual_seed(3)
    gammas = [(torch.rand(len(w), generator=generator) * 0.03 + 1e-5).to(DEVICE) for w in made]
    before = [pack_mask((torch.rand(w.shape, generator=generator) < 0.5).to(DEVICE)) for w in made]
    all_of = kernel.codes_of_many(
        made, gammas, *nm, mask_source=source, with_mask=True, transpose=True, previous=before
    )
    masks, codes_t, flips = all_of.masks, all_of.codes_t, all_of.flips
    assert masks is not None
    assert codes_t is not None
    assert flips is not None
    assert all_of.planes == [None] * len(made)
    for i, (w, gamma) in enumerate(zip(made, gammas, strict=True)):
        expected, mask = reference.codes_from_gamma(w, gamma, *nm, mask_source=source)
        assert_same_bits(all_of.codes[i], expected)
        assert_same_bits(codes_t[i], expected.t())
        assert_same_bits(masks[i], mask)
        assert int(flips[i]) == int(flip_count(before[i], pack_mask(mask)))


@pytest.mark.parametrize("given", [False, True], ids=["masks made", "masks given"])
@pytest.mark.parametrize("nm", kernel_cases(SPARSITIES, QUICK[1:]), ids=str)
def test_planes_hold_the_codes_of_the_same_pass(nm: tuple[int, int], given: bool) -> None:
    """Also of widths that are no whole blocks, beside weights without planes, with all else that the pass makes."""
    made = [
        *three_layers(torch.float32),
        torch.randn(17, 1056, generator=torch.Generator().manual_seed(5)).to(DEVICE) * 0.02,
    ]
    gammas = [torch.full((len(w),), 0.01, device=DEVICE) for w in made]
    masks = [reference.nm_mask(w.flip(1), *nm) for w in made] if given else None
    before = [pack_mask(torch.ones(w.shape, dtype=torch.bool, device=DEVICE)) for w in made]
    wanted = [True, False, True, True]
    options = {"masks": masks, "with_mask": True, "transpose": True, "previous": before}
    plain = kernel.codes_of_many(made, gammas, *nm, **options)
    all_of = kernel.codes_of_many(made, gammas, *nm, **options, planes=wanted)
    for want, codes, planes in zip(wanted, all_of.codes, all_of.planes, strict=True):
        assert (planes is not None) == want
        assert_same_bits(planes, pack_planes(codes) if want else None)
    for name in ("codes", "masks", "codes_t"):
        assert_same_bits(getattr(all_of, name), getattr(plain, name))
    assert all_of.flips is not None
    assert plain.flips is not None
    assert_same_bits(all_of.flips, plain.flips)


def test_given_masks_are_used_as_they_are() -> None:
    made = three_layers(torch.float32)
    gammas = [torch.full((len(w),), 0.01, device=DEVICE) for w in made]
    masks = [(torch.rand(w.shape) < 0.5).to(DEVICE) for w in made]
    all_of = kernel.codes_of_many(made, gammas, 6, 8, masks=masks, with_mask=True)
    for w, gamma, mask, ours, mine in zip(made, gammas, masks, all_of.codes, all_of.masks or (), strict=True):
        assert_same_bits(ours, reference.codes_from_gamma(w, gamma, 6, 8, mask=mask)[0])
        assert_same_bits(mine, mask)
