"""Triton's SwiGLU to int8: codes of its own h exactly, h and gradients against fp64."""

import pytest
import torch
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.gpu.quantize.swiglu_quantize import swiglu_abs_max, swiglu_backward, swiglu_quantize
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
SHAPES = ((3, 896), (1, 4864), (1, 18944), (2, 3, 17), (5, 1), (0, 8))


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gate_up [..., 2 ffn] and the gradient of h."""
    generator = torch.Generator().manual_seed(shape[-1])
    gate_up = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator) * 3
    return gate_up.to(dtype).to(DEVICE), torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_of_the_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up, _ = inputs(shape, dtype)
    x_q, s_x, h = swiglu_quantize(gate_up, keep_output=True)
    assert h is not None
    torch.testing.assert_close(h.double(), swiglu(gate_up), rtol=EPSILON[dtype], atol=1e-6)
    assert_same_bits((x_q, s_x), reference.quantize_activations(h))
    largest = swiglu_abs_max(gate_up)
    assert_same_bits(largest, reference.activation_abs_max(h))
    given = swiglu_quantize(gate_up, abs_max=largest * 2)
    assert_same_bits(given[:2], reference.quantize_activations(h, abs_max=largest * 2))


def test_slices_of_a_token_make_the_whole_token() -> None:
    """What row-parallel ranks do: each has half of gate and of up."""
    gate_up, _ = inputs((3, 34), torch.bfloat16)
    whole = swiglu_quantize(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    halves = [torch.cat([gate[:, s], up[:, s]], dim=-1) for s in (slice(0, 17), slice(17, 34))]
    largest = torch.stack([swiglu_abs_max(half) for half in halves]).amax(0)
    parts = [swiglu_quantize(half, abs_max=largest) for half in halves]
    assert_same_bits(torch.cat([part[0] for part in parts], dim=-1), whole[0])
    assert_same_bits([part[1] for part in parts], [whole[1]] * len(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1100)], ids=str)
def test_gradients_are_those_of_autograd(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up, dh = inputs(shape, dtype)
    gradient = swiglu_backward(dh, gate_up)
    exact = gate_up.double().requires_grad_()
    swiglu(exact).backward(dh.double())
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=EPSILON[dtype], atol=1e-5)


def test_extreme_gates_are_finite() -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 1.0, 1.0]], device=DEVICE)
    _, _, h = swiglu_quantize(gate_up, keep_output=True)
    assert h is not None
    assert h.tolist() == [[0.0, 200.0]]
    assert swiglu_backward(torch.ones(1, 2, device=DEVICE), gate_up).isfinite().all()


def test_shapes_that_do_not_fit_are_named() -> None:
    gate_up, dh = inputs((2, 17), torch.float32)
    with pytest.raises(ValueError, match=r"must be \[..., 2 ffn\]"):
        swiglu_quantize(gate_up[:, :33])
    with pytest.raises(ValueError, match="one value per token"):
        swiglu_quantize(gate_up, abs_max=torch.ones(3, device=DEVICE))
    with pytest.raises(ValueError, match="dh has shape"):
        swiglu_backward(dh[:1], gate_up)
