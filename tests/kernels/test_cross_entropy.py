"""Blocks of logits: PyTorch's and Triton's three numbers and gradient, against fp64."""

import pytest
import torch
from same_bits import assert_same_bits
from sbn_kernels.cpu import cross_entropy as on_cpu
from sbn_kernels.gpu import cross_entropy as on_gpu
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = pytest.mark.parametrize("code", [on_gpu, on_cpu], ids=["gpu", "cpu"])
SHAPES = ((3, 17), (2, 5000), (1, 1), (4, 4096), (0, 9))


def inputs(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(shape[1])
    logits = torch.randn(shape, generator=generator) * 4
    target = torch.randint(-1, shape[1], shape[:1], generator=generator)
    return logits.to(DEVICE), target.to(DEVICE)


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_numbers_make_the_loss(code: object, shape: tuple[int, int]) -> None:
    logits, target = inputs(shape)
    maximum, exp_sum, target_logit = code.logit_statistics(logits, target)  # type: ignore[attr-defined]
    assert_same_bits(maximum, logits.amax(1) if len(logits) else maximum)
    lse = torch.logsumexp(logits.double(), 1)
    torch.testing.assert_close(maximum.double() + exp_sum.double().log(), lse, rtol=1e-6, atol=1e-6)
    for token, index in enumerate(target.tolist()):
        assert float(target_logit[token]) == (float(logits[token, index]) if index >= 0 else 0.0)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_is_softmax_less_the_target(code: object, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, target = inputs(shape)
    lse = torch.logsumexp(logits, 1)
    expected = torch.softmax(logits.double(), 1)
    for token, index in enumerate(target.tolist()):
        if index >= 0:
            expected[token, index] -= 1
    if len(logits) > 2:
        lse[2], target[2], expected[2] = torch.inf, -1, 0.0
    gradient = code.logit_gradient(logits, lse, target, dtype)  # type: ignore[attr-defined]
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected, rtol=2.0**-8 if dtype != torch.float32 else 3e-6, atol=1e-6)


@IMPLEMENTATIONS
def test_very_large_and_masked_logits_do_not_overflow(code: object) -> None:
    logits = torch.tensor([[1e4, 1e4, -1e4], [-torch.inf, 3.0, -torch.inf]], device=DEVICE)
    maximum, exp_sum, _ = code.logit_statistics(logits, torch.tensor([0, 1], device=DEVICE))  # type: ignore[attr-defined]
    assert maximum.tolist() == [1e4, 3.0]
    assert exp_sum.tolist() == [2.0, 1.0]


def test_other_types_are_refused() -> None:
    logits, target = inputs((3, 17))
    with pytest.raises(ValueError, match="contiguous fp32"):
        on_gpu.logit_statistics(logits.bfloat16(), target)
    with pytest.raises(ValueError, match="one each is wanted"):
        on_gpu.logit_gradient(logits, torch.ones(2, device=DEVICE), target, torch.float32)
