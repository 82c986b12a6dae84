"""Triton's int8 activations: the bits of the reference."""

import pytest
import torch
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.gpu.quantize import activation_quantize as kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3, 896), (2, 4864), (1, 11008), (5, 1), (2, 3, 17), (0, 8), (40,))


def tokens(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Tokens of very different sizes; the last one of many has a NaN, one before it an Inf."""
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-4, 4, (*shape[:-1], 1), generator=generator)
    x = x.to(dtype)
    if x.numel() // shape[-1] > 2:
        x.view(-1, shape[-1])[-1, -1] = torch.nan
        x.view(-1, shape[-1])[-2, 0] = -torch.inf
    return x.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activations_have_the_references_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = tokens(shape, dtype)
    for bits in (8, 4):
        assert_same_bits(kernel.quantize_activations(x, bits), reference.quantize_activations(x, bits))
    largest = kernel.activation_abs_max(x)
    assert_same_bits((largest,), (reference.activation_abs_max(x),))
    wider = largest * 1.5
    assert_same_bits(kernel.quantize_activations(x, abs_max=wider), reference.quantize_activations(x, abs_max=wider))


def test_halves_ties_and_subnormals_round_as_the_reference() -> None:
    steps = torch.arange(-254, 255, device=DEVICE) / 2
    x = torch.stack([steps, steps * 2.0**-140, torch.full_like(steps, 2.0**-149), torch.zeros_like(steps)])
    for bits in (8, 4):
        assert_same_bits(kernel.quantize_activations(x, bits), reference.quantize_activations(x, bits))


def test_strided_tokens_are_read_where_they_are() -> None:
    x = tokens((6, 64), torch.float32)[:, ::2]
    assert_same_bits(kernel.quantize_activations(x), reference.quantize_activations(x))
    wide = tokens((6, 64), torch.bfloat16)[:, :40]
    assert_same_bits(kernel.quantize_activations(wide), reference.quantize_activations(wide))


def test_bad_arguments_are_named() -> None:
    x = torch.ones(2, 8, device=DEVICE)
    with pytest.raises(ValueError, match="must be 8 or 4, got 2"):
        kernel.quantize_activations(x, 2)
    with pytest.raises(ValueError, match="4-bit activations are scaled by their mean"):
        kernel.quantize_activations(x, 4, abs_max=x[:, 0])
    with pytest.raises(ValueError, match="one value per token"):
        kernel.quantize_activations(x, abs_max=x)
    with pytest.raises(ValueError, match="in >= 1"):
        kernel.quantize_activations(x[:, :0])
    with pytest.raises(ValueError, match="longer than the 32768"):
        kernel.quantize_activations(torch.ones(1, 32769, device=DEVICE))
