"""Triton's RMSNorm to int8: codes of its own y exactly, y and gradients against fp64."""

import pytest
import torch
from cases import kernel_cases
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.gpu.quantize import rms_norm_quantize as kernel
from sbn_kernels.gpu.quantize.rms_norm_quantize import rms_norm_backward, rms_norm_quantize
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SHAPES = ((3, 896), (1, 4864), (2, 3, 17), (5, 1), (0, 8))


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(shape[-1])
    x, dy = (torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    return x, (torch.rand(shape[-1], generator=generator) + 0.5).to(DEVICE), dy


def norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_of_the_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, _ = inputs(shape, dtype)
    x_q, s_x, rstd, y = rms_norm_quantize(x, weight, keep_output=True)
    assert y is not None
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), norm(x, weight), rtol=EPSILON[dtype], atol=1e-7)
    expected = reference.quantize_activations(y)
    assert_same_bits((x_q, s_x), expected)
    torch.testing.assert_close(rstd.double(), 1 / (x.double().square().mean(-1) + 1e-5).sqrt(), rtol=1e-6, atol=0)
    assert_same_bits(rms_norm_quantize(x, weight)[:3], (x_q, s_x, rstd))


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x, weight, _ = inputs((6, 896), torch.bfloat16)
    whole, alone = rms_norm_quantize(x, weight), rms_norm_quantize(x[4:5], weight)
    assert_same_bits([t[4:5] for t in whole[:3]], alone[:3])


def test_a_token_with_nan_gives_a_scale_of_nan() -> None:
    x, weight, _ = inputs((2, 17), torch.float32)
    x[1, 3] = torch.nan
    x_q, s_x, _, _ = rms_norm_quantize(x, weight)
    assert s_x.isnan().tolist() == [False, True]
    assert not x_q[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", kernel_cases([*SHAPES, (700, 8)], SHAPES), ids=str)
def test_gradients_are_those_of_autograd(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, dy = inputs(shape, dtype)
    rstd = rms_norm_quantize(x, weight)[2]
    dx, dweight = rms_norm_backward(dy, x, weight, rstd)
    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    norm(x64, weight64).backward(dy.double())
    assert dx.dtype == dtype
    torch.testing.assert_close(dx.double(), x64.grad, rtol=EPSILON[dtype], atol=max(EPSILON[dtype], 1e-5))
    torch.testing.assert_close(dweight.double(), weight64.grad, rtol=1e-5, atol=1e-4)


def test_programs_that_take_several_tokens_add_their_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above with 700 tokens, and here with few that are shared out among fewer programs."""
    x, weight, dy = inputs((7, 17), torch.float32)
    rstd = rms_norm_quantize(x, weight)[2]
    dx, dweight = rms_norm_backward(dy, x, weight, rstd)
    monkeypatch.setattr(kernel, "_PARTIAL_SUMS", 3)
    fewer_dx, fewer_dweight = rms_norm_backward(dy, x, weight, rstd)
    assert_same_bits(fewer_dx, dx)
    torch.testing.assert_close(fewer_dweight, dweight, rtol=1e-6, atol=1e-6)


def test_shapes_that_do_not_fit_are_named() -> None:
    x, weight, dy = inputs((2, 17), torch.float32)
    with pytest.raises(ValueError, match=r"weight has shape \(16,\)"):
        rms_norm_quantize(x, weight[:16])
    with pytest.raises(ValueError, match="do not go with x"):
        rms_norm_backward(dy[:1], x, weight, torch.ones(2, device=DEVICE))
