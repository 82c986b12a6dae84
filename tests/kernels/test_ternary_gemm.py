"""Integer GEMMs on tensor cores: bit for bit those of the reference, at any shape, through pointers and TMA."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from operands import DEVICE, operands
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.gpu.gemm import ternary_gemm
from sbn_kernels.gpu.primitives.tiles import Tile, gpu_family
from triton.runtime.errors import OutOfResources

TILE = Tile(64, 128, 128, warps=4)  # forced, so that tests on a GPU measure nothing; one test below lets it choose
SMALL = Tile(32, 32, 64, warps=4)
WIDE = Tile(16, 128, 128, warps=4, stages=2, group=2)
THROUGH_TMA = Tile(64, 32, 128, warps=4, tma=True)
SHAPES = [(1, 8, 896), (17, 33, 100), (5, 896, 16), (40, 7, 4864), (2, 3, 11008), (70, 130, 192)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_have_the_bits_of_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x_q, s_x, codes, gamma, bias = operands(*shape)
    for b in (None, bias, bias.to(dtype)):
        expected = reference.ternary_linear(x_q, s_x, codes, gamma, b, dtype)
        assert_same_bits(ternary_gemm.ternary_linear(x_q, s_x, codes, gamma, b, dtype, config=TILE), expected)


@pytest.mark.parametrize("tile", [SMALL, WIDE, THROUGH_TMA], ids=lambda tile: tile.name)
@pytest.mark.parametrize("shape", [(40, 70, 192), (17, 33, 80), (130, 5, 896)], ids=str)
def test_the_tile_does_not_show(shape: tuple[int, int, int], tile: Tile) -> None:
    x_q, s_x, codes, gamma, bias = operands(*shape)
    expected = reference.ternary_linear(x_q, s_x, codes, gamma, bias, torch.bfloat16)
    assert_same_bits(ternary_gemm.ternary_linear(x_q, s_x, codes, gamma, bias, torch.bfloat16, config=tile), expected)


def test_the_bias_is_added_after_the_product_was_rounded() -> None:
    x_q, s_x, codes, gamma, _ = operands(64, 64, 64)
    scaled = (x_q.double() @ codes.double().t()) * s_x.double().unsqueeze(1)
    bias = -(scaled.float()[0] * gamma)  # cancels token 0: a fused multiply-add would leave the product's lost bits
    y = ternary_gemm.ternary_linear(x_q, s_x, codes, gamma, bias, config=TILE)
    assert_same_bits(y, reference.ternary_linear(x_q, s_x, codes, gamma, bias))
    assert not y[0].any()


@pytest.mark.parametrize("tile", [TILE, THROUGH_TMA], ids=["pointers", "tma"])
def test_sums_at_the_limit_of_exactness(tile: Tile) -> None:
    x_q = torch.full((2, 131072), -128, dtype=torch.int8, device=DEVICE)
    codes = torch.ones(3, 131072, dtype=torch.int8, device=DEVICE)
    codes[1], codes[2, 5] = -1, 0
    assert ternary_gemm.int_matmul(x_q, codes, config=tile).tolist() == [[-(2.0**24), 2.0**24, 128 - 2.0**24]] * 2
    a = torch.full((1, 131072), 127, dtype=torch.int8, device=DEVICE)
    assert ternary_gemm.int8_matmul(a, x_q, config=tile).tolist() == [[-127 * 128 * 131072] * 2]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_raw_sums(shape: tuple[int, int, int]) -> None:
    x_q, _, codes, _, _ = operands(*shape)
    assert_same_bits(ternary_gemm.int_matmul(x_q, codes, config=TILE), reference.int_matmul(x_q, codes))
    full = operands(shape[1], 4, shape[2], seed=1)[0]
    assert_same_bits(ternary_gemm.int8_matmul(x_q, full, config=TILE), reference.int8_matmul(x_q, full))


def test_leading_dimensions_and_strides() -> None:
    x_q, s_x, codes, gamma, _ = operands(24, 10, 48)
    whole = reference.ternary_linear(x_q, s_x, codes, gamma)

    def run(*call: torch.Tensor) -> torch.Tensor:
        return ternary_gemm.ternary_linear(*call, config=TILE)

    assert_same_bits(run(x_q.view(2, 3, 4, 48), s_x.view(2, 3, 4), codes, gamma), whole.view(2, 3, 4, 10))
    assert_same_bits(run(x_q[::2], s_x[::2], codes, gamma), whole[::2])
    assert_same_bits(run(x_q, s_x, codes.t().contiguous().t(), gamma), whole)
    assert_same_bits(run(x_q[0], s_x[0], codes, gamma), whole[0])


def test_every_tile_for_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SBN_KERNELS_CACHE", str(tmp_path))
    x_q, s_x, codes, gamma, bias = operands(150, 300, 256)
    expected = reference.ternary_linear(x_q, s_x, codes, gamma, bias, torch.bfloat16)
    for tile in ternary_gemm.INT8_TILES[gpu_family(x_q.device)]:
        with suppress(OutOfResources):
            y = ternary_gemm.ternary_linear(x_q, s_x, codes, gamma, bias, torch.bfloat16, config=tile)
            assert_same_bits(y, expected, tile)
    assert_same_bits(ternary_gemm.ternary_linear(x_q, s_x, codes, gamma, bias, torch.bfloat16), expected)
    odd = ternary_gemm.ternary_linear(x_q[:, :99], s_x, codes[:, :99], gamma)
    assert_same_bits(odd, reference.ternary_linear(x_q[:, :99], s_x, codes[:, :99], gamma))


@pytest.mark.parametrize("shape", [(0, 5, 16), (3, 0, 16)], ids=str)
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    x_q, s_x, codes, gamma, _ = operands(*shape)
    assert ternary_gemm.ternary_linear(x_q, s_x, codes, gamma).shape == shape[:2]
    assert ternary_gemm.int_matmul(x_q, codes).shape == shape[:2]


def test_a_token_that_was_nan_is_nan_and_no_other() -> None:
    x_q, s_x, codes, gamma, bias = operands(5, 9, 64)
    x_q[2], s_x[2] = 0, torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        y = ternary_gemm.ternary_linear(x_q, s_x, codes, gamma, bias, dtype, config=TILE)
        assert y.isnan().any(dim=1).tolist() == y.isnan().all(dim=1).tolist() == [False, False, True, False, False]


def test_operands_that_do_not_fit_are_named() -> None:
    x_q, s_x, codes, gamma, bias = operands(5, 9, 64)
    with pytest.raises(ValueError, match="int8 operands, got torch.float32"):
        ternary_gemm.int_matmul(x_q.float(), codes)
    with pytest.raises(ValueError, match=r"shapes \(5, 64\) and \(9, 60\)"):
        ternary_gemm.int_matmul(x_q, codes[:, :60])
    with pytest.raises(ValueError, match=r"s_x must be fp32 \(5,\)"):
        ternary_gemm.ternary_linear(x_q, s_x[:4], codes, gamma)
    with pytest.raises(ValueError, match=r"gamma_per_row must be fp32 \(9,\)"):
        ternary_gemm.ternary_linear(x_q, s_x, codes, gamma.double())
    with pytest.raises(ValueError, match=r"bias must be float \(9,\)"):
        ternary_gemm.ternary_linear(x_q, s_x, codes, gamma, bias[:1])
    with pytest.raises(ValueError, match="multiples of 16 bytes, not 60"):
        ternary_gemm.int_matmul(x_q[:, :60], codes[:, :60], config=THROUGH_TMA)
    long = torch.zeros(1, 131073, dtype=torch.int8, device=DEVICE)
    with pytest.raises(ValueError, match="at most 131072"):
        ternary_gemm.int_matmul(long, long)
