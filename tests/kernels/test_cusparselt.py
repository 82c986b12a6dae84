"""The cuSPARSELt path: the epilogue exactly, the layouts handed to the library by a stand-in, itself on a GPU."""

import pytest
import torch
from operands import operands
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.gpu.gemm import cusparselt


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Replaces the library by its contract: what `torch._cslt_*` takes and gives, in integers. Records B's shapes."""
    seen: list[tuple[int, ...]] = []

    def sparse_mm(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype, transpose_result: bool) -> torch.Tensor:
        assert a.dtype == b.dtype == torch.int8
        assert b.stride() == (1, b.shape[0]), "the library wants B column-major for int8"
        assert all(size % 32 == 0 for size in (*a.shape, *b.shape))
        assert out_dtype == torch.int32
        seen.append(tuple(b.shape))
        result = (a.cpu().double() @ b.cpu().double()).to(torch.int32).to(b.device)
        return result.t().contiguous() if transpose_result else result

    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", lambda codes: codes.clone())
    monkeypatch.setattr(torch, "_cslt_sparse_mm", sparse_mm)
    return seen


@pytest.mark.parametrize("tokens", [0, 1, 17, 32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layouts_and_scales(stand_in: list[tuple[int, ...]], tokens: int, dtype: torch.dtype) -> None:
    x_q, s_x, codes, gamma, bias = operands(tokens, 96, 896, two_four=True)
    weight = cusparselt.compress(codes)
    for added in (None, bias, bias.bfloat16()):
        y = cusparselt.cusparselt_linear(x_q, s_x, weight, gamma, added, dtype)
        assert_same_bits(y, reference.ternary_linear(x_q, s_x, codes, gamma, added, dtype))
    assert set(stand_in) == ({(896, -(-tokens // 32) * 32)} if tokens else set())


def test_result_shape_is_what_pytorch_declares() -> None:
    """PyTorch's shape function of the operator: transpose_result gives [tokens, out]."""
    codes = torch.empty(64, 128, dtype=torch.int8, device="meta")
    x_q = torch.empty(32, 256, dtype=torch.int8, device="meta")
    acc = torch._cslt_sparse_mm(codes, x_q.t(), out_dtype=torch.int32, transpose_result=True)
    assert acc.shape == (32, 64)
    assert acc.dtype == torch.int32


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x_q, s_x, codes, gamma, _ = operands(2, 32, 32, two_four=True)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    with pytest.raises(ValueError, match="has no cuSPARSELt here"):
        cusparselt.compress(codes)
    with pytest.raises(ValueError, match="has no cuSPARSELt here"):
        cusparselt.cusparselt_linear(x_q, s_x, cusparselt.CompressedWeight(codes, 32, 32), gamma)


def test_what_does_not_fit_is_refused(stand_in: list[tuple[int, ...]]) -> None:
    x_q, s_x, codes, gamma, bias = operands(2, 32, 64, two_four=True)
    for bad, message in (
        (codes.float(), "takes int8 codes"),
        (codes[0], "takes int8 codes"),
        (codes[:17], "multiples of 32, got 17 x 64"),
        (codes[:, :48], "multiples of 32, got 32 x 48"),
        (torch.ones_like(codes), "more than 2 non-zeros"),
    ):
        with pytest.raises(ValueError, match=message):
            cusparselt.compress(bad)
    weight = cusparselt.compress(codes)
    for arguments, message in (
        ((x_q.float(), s_x, weight, gamma), "x_q must be contiguous int8"),
        ((x_q[:, :32], s_x, weight, gamma), "x_q must be contiguous int8"),
        ((x_q, s_x[:1], weight, gamma), "s_x must be fp32"),
        ((x_q, s_x.double(), weight, gamma), "scales must be fp32"),
        ((x_q, s_x, weight, gamma[:1]), "gamma_per_row and bias must be"),
        ((x_q, s_x, weight, gamma, bias[:1]), "gamma_per_row and bias must be"),
    ):
        with pytest.raises(ValueError, match=message):
            cusparselt.cusparselt_linear(*arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.backends.cusparselt.is_available(), reason="PyTorch without cuSPARSELt")
@pytest.mark.parametrize(("tokens", "out", "width"), [(1, 32, 32), (17, 896, 4864), (300, 2048, 11008)])
def test_on_a_gpu(tokens: int, out: int, width: int) -> None:
    x_q, s_x, codes, gamma, bias = operands(tokens, out, width, two_four=True)
    weight = cusparselt.compress(codes)
    for added in (None, bias):
        y = cusparselt.cusparselt_linear(x_q, s_x, weight, gamma, added, torch.bfloat16)
        assert_same_bits(y, reference.ternary_linear(x_q, s_x, codes, gamma, added, torch.bfloat16))
