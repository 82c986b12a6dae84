"""Each GEMM of the CPU backend: exact, also where oneDNN without VNNI could saturate, and at any shape."""

import pytest
import torch
from same_bits import assert_same_bits
from sbn_kernels import TernaryWeight, reference, tuning
from sbn_kernels.cpu import linear
from torch import Tensor

SHAPES = ((1, 1, 1), (3, 17, 5), (17, 896, 64), (2, 4864, 3), (1, 11008, 2), (0, 8, 4), (130, 64, 96))


def saturating_operands(tokens: int, width: int, rows: int) -> tuple[Tensor, Tensor]:
    """The largest integers and rows of equal codes among random ones: what saturates if anything does."""
    generator = torch.Generator().manual_seed(width)
    x_q = torch.randint(-128, 128, (tokens, width), dtype=torch.int8, generator=generator)
    codes = torch.randint(-1, 2, (rows, width), dtype=torch.int8, generator=generator)
    x_q[:1], x_q[1:2], codes[0] = -128, 127, 1
    codes[1:2] = -1
    return x_q, codes


@pytest.mark.parametrize("gemm", ["float", "onednn", "int_mm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_gemm_is_exact(shape: tuple[int, int, int], gemm: str) -> None:
    x_q, codes = saturating_operands(*shape)
    expected = x_q.long() @ codes.long().t()
    if gemm != "float" and not x_q.numel():
        return  # never chosen for empty operands
    s_x, gamma = torch.rand(shape[0]), torch.rand(shape[2])
    weight = TernaryWeight(codes, gamma)
    acc = linear.int_matmul(x_q, weight, gemm=gemm)
    assert acc.dtype == torch.float32
    assert_same_bits(acc.long(), expected)
    by_columns = TernaryWeight(codes.t().contiguous().t(), gamma)
    assert_same_bits(linear.int_matmul(x_q, by_columns, gemm=gemm), acc)
    for dtype in (torch.float32, torch.bfloat16):
        for bias in (None, torch.rand(shape[2])):
            y = linear.ternary_linear(x_q, s_x, weight, bias, dtype, gemm=gemm)
            assert_same_bits(y, reference.ternary_linear(x_q, s_x, codes, gamma, bias, dtype))


@pytest.mark.parametrize("gemm", ["float", "onednn", "int_mm"])
def test_the_longest_sums_are_exact(gemm: str) -> None:
    x_q, codes = saturating_operands(2, 131072, 3)
    acc = linear.int_matmul(x_q, TernaryWeight(codes, torch.ones(3)), gemm=gemm)
    assert_same_bits(acc.long(), x_q.long() @ codes.long().t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_gradients_have_the_references_bits(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, _, rows = shape
    x_q, codes = saturating_operands(*shape)
    dy, gamma, s_x = (torch.randn(tokens, rows) * 1e-4).to(dtype), torch.rand(rows), torch.rand(tokens)
    if tokens > 2:
        dy[2, 0] = torch.nan
    for mode in ("int8_dgrad", "int8"):
        ours = linear.input_gradient(dy, TernaryWeight(codes, gamma), mode)
        expected = reference.input_gradient(dy, codes, gamma, None, mode)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    ours, expected = (f.weight_gradient(dy, x_q, s_x, "int8") for f in (linear, reference))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_gradients_are_those_of_fp64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, _, rows = shape
    x_q, codes = saturating_operands(*shape)
    dy, gamma, s_x = torch.randn(tokens, rows).to(dtype), torch.rand(rows), torch.rand(tokens)
    dx = linear.input_gradient(dy, TernaryWeight(codes, gamma))
    expected = (dy.double() * gamma.double()) @ codes.double()
    bound = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    assert dx.dtype == dtype
    torch.testing.assert_close(dx.double(), expected, rtol=bound, atol=1e-4)
    dw = linear.weight_gradient(dy, x_q, s_x)
    expected = (dy.double() * s_x.double().unsqueeze(1)).t() @ x_q.double()
    torch.testing.assert_close(dw.double(), expected, rtol=1e-5, atol=1e-3)


def test_the_gemm_is_measured_once_and_small_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def choose(operation: str, key: dict[str, object], candidates: dict[str, object], **_: object) -> str:
        asked.append((operation, key))
        assert set(candidates) == {"float", "onednn", "int_mm"}
        assert all(run().shape == (64, 1024) for run in candidates.values())  # type: ignore[operator]
        return "onednn"

    monkeypatch.setattr(tuning, "choose", choose)
    codes = torch.ones(1024, 64, dtype=torch.int8)
    assert linear.choose_gemm(8, codes) == "float"
    assert not asked
    assert linear.choose_gemm(300, codes) == "onednn"
    assert asked == [("cpu_product", {"tokens": 64, "out": 1024, "in": 64, "threads": torch.get_num_threads()})]
