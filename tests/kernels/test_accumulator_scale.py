"""Triton's scaling of summed integers: the bits of the reference."""

import pytest
import torch
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.gpu.accumulator_scale import scale_accumulator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kind", [torch.int32, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 896), (2, 3, 17), (1, 1), (0, 5)], ids=str)
def test_scales_have_the_references_bits(
    shape: tuple[int, ...], with_bias: bool, dtype: torch.dtype, kind: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    acc = torch.randint(-50000, 50000, shape, generator=generator).to(kind).to(DEVICE)
    s_x, gamma = torch.rand(shape[:-1], generator=generator).to(DEVICE), torch.rand(shape[-1], generator=generator)
    bias = torch.randn(shape[-1], generator=generator).bfloat16().to(DEVICE) if with_bias else None
    arguments = (acc, s_x, gamma.to(DEVICE), bias, dtype)
    assert_same_bits(scale_accumulator(*arguments), reference.scale_accumulator(*arguments))


@pytest.mark.parametrize(("tokens", "out"), [(0, 5), (1, 1), (17, 896), (3, 4864), (2, 11008)])
def test_the_largest_integers_of_awkward_widths(tokens: int, out: int) -> None:
    generator = torch.Generator().manual_seed(out)
    acc = torch.randint(-(2**24), 2**24 + 1, (tokens + 3, out), dtype=torch.int32, generator=generator).to(DEVICE)
    s_x = torch.rand(tokens, generator=generator).to(DEVICE)
    gamma, bias = torch.rand(2, out, generator=generator).to(DEVICE)
    for added, dtype in ((None, torch.float32), (bias, torch.float32), (bias.half(), torch.bfloat16)):
        expected = reference.scale_accumulator(acc[:tokens], s_x, gamma, added, dtype)
        assert_same_bits(scale_accumulator(acc[:tokens], s_x, gamma, added, dtype), expected)


def test_other_types_are_refused() -> None:
    acc, one = torch.ones(2, 3, device=DEVICE), torch.ones(2, device=DEVICE)
    with pytest.raises(ValueError, match="must be int32 or fp32"):
        scale_accumulator(acc.double(), one, torch.ones(3, device=DEVICE))
    with pytest.raises(ValueError, match=r"must be \[3\]"):
        scale_accumulator(acc, one, one)
    with pytest.raises(ValueError, match="scales must be fp32"):
        scale_accumulator(acc, one.half(), torch.ones(3, device=DEVICE))
