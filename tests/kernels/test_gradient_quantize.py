"""Triton's int8 gradients, by token and by column: the bits of the reference."""

import pytest
import torch
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.gpu.quantize.gradient_quantize import quantize_gradient, quantize_gradient_columns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((3, 896), (1, 4864), (130, 65), (2, 3, 17), (5, 1), (0, 8))


def gradients(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Gradients of very different sizes, with a NaN and an Inf where there is room."""
    generator = torch.Generator().manual_seed(shape[-1])
    dy = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-9, 0, (*shape[:-1], 1), generator=generator)
    if dy.numel() > 100:
        dy.view(-1, shape[-1])[-1, -1], dy.view(-1, shape[-1])[0, 1] = torch.nan, -torch.inf
    return dy.to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_have_the_references_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    dy, gamma = gradients(shape, dtype), torch.rand(shape[-1], device=DEVICE)
    assert_same_bits(quantize_gradient(dy, gamma), reference.quantize_rows(dy.float() * gamma))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_columns_have_the_references_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    dy, s_x = gradients(shape, dtype), torch.rand(shape[:-1], device=DEVICE)
    h = (dy.float() * s_x.unsqueeze(-1)).flatten(0, -2).t()
    assert_same_bits(quantize_gradient_columns(dy, s_x), reference.quantize_rows(h))


def test_no_tokens_and_bad_shapes() -> None:
    dy = gradients((0, 8), torch.float32)
    h_q, s = quantize_gradient_columns(dy, torch.ones(0, device=DEVICE))
    assert (h_q.shape, s.shape) == ((8, 0), (8,))
    with pytest.raises(ValueError, match=r"gamma_per_row has shape \(7,\)"):
        quantize_gradient(dy, torch.ones(7, device=DEVICE))
    with pytest.raises(ValueError, match="one value per token"):
        quantize_gradient_columns(dy, torch.ones(3, device=DEVICE))
