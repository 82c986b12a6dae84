"""Products from codes at 2 bits: bit for bit those of int8 codes, and gradients from transposed planes."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from operands import DEVICE, operands
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.formats.planes import codes_to_planes, pack_planes
from sbn_kernels.gpu.gemm import planes_gemm, ternary_dgrad
from sbn_kernels.gpu.primitives.tiles import Tile, gpu_family
from triton.runtime.errors import OutOfResources

TILE = Tile(64, 32, 256, warps=4)  # forced, so that tests on a GPU measure nothing; one test below lets it choose
SHAPES = [(1, 8, 896), (17, 33, 100), (40, 7, 4864), (2, 3, 11008), (70, 130, 256), (0, 5, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_have_the_bits_of_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x_q, s_x, codes, gamma, bias = operands(*shape)
    packed = pack_planes(codes)
    for b in (None, bias):
        y = planes_gemm.ternary_linear_planes(x_q, s_x, packed, gamma, b, dtype, config=TILE)
        assert_same_bits(y, reference.ternary_linear(x_q, s_x, codes, gamma, b, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_raw_sums(shape: tuple[int, int, int]) -> None:
    x_q, _, codes, _, _ = operands(*shape)
    sums = planes_gemm.int_matmul_planes(x_q, pack_planes(codes), config=TILE)
    assert_same_bits(sums, reference.int_matmul(x_q, codes))


@pytest.mark.parametrize(
    "tile", [Tile(128, 16, 256, warps=4), Tile(32, 64, 256, warps=4, group=2)], ids=lambda t: t.name
)
def test_the_tile_does_not_show(tile: Tile) -> None:
    x_q, s_x, codes, gamma, bias = operands(70, 140, 300)
    y = planes_gemm.ternary_linear_planes(
        x_q.view(7, 10, 300), s_x.view(7, 10), pack_planes(codes), gamma, bias, config=tile
    )
    assert_same_bits(y, reference.ternary_linear(x_q, s_x, codes, gamma, bias).view(7, 10, 140))


def test_every_tile_for_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SBN_KERNELS_CACHE", str(tmp_path))
    for features in (512, 300, 320):
        x_q, s_x, codes, gamma, bias = operands(150, 200, features)
        packed, expected = pack_planes(codes), reference.ternary_linear(x_q, s_x, codes, gamma, bias)
        for tile in (*planes_gemm.PLANES_TILES[gpu_family(x_q.device)], None):
            with suppress(OutOfResources):
                y = planes_gemm.ternary_linear_planes(x_q, s_x, packed, gamma, bias, config=tile)
                assert_same_bits(y, expected, tile)


@pytest.mark.parametrize("parts", [None, ((0, 128, 0), (128, 172, 1)), ((0, 100, 0), (100, 200, 1))], ids=str)
@pytest.mark.parametrize("rows", [300, 512])
def test_input_gradient_from_planes_equals_that_from_codes(rows: int, parts: tuple | None) -> None:
    if parts is not None:
        parts = (*parts[:-1], (parts[-1][0], rows - parts[-1][0], 1))
    _, _, codes, _, _ = operands(5, rows, 40)
    dy = torch.randn(20, rows).to(DEVICE, torch.bfloat16)
    gamma = torch.ones(rows, device=DEVICE)
    for start, length, part in parts or ():
        gamma[start : start + length] = 0.3 + part
    run, tile = ternary_dgrad.ternary_dgrad, Tile(32, 32, 64, warps=4)
    dx = run(dy, gamma, codes_to_planes(codes, transpose=True), parts, config=tile)
    assert_same_bits(dx, run(dy, gamma, codes.t().contiguous(), parts, config=tile))
    assert dx.any()
    with pytest.raises(ValueError, match="cannot read planes: its k must be 64"):
        run(dy, gamma, codes_to_planes(codes, transpose=True), parts, config=Tile(32, 32, 32))


def test_operands_that_do_not_fit_are_named() -> None:
    x_q, s_x, codes, gamma, _ = operands(4, 8, 300)
    packed = pack_planes(codes)
    with pytest.raises(ValueError, match=r"planes of 200 codes are uint8 \[rows, 64\], got torch.uint8 \(8, 128\)"):
        planes_gemm.int_matmul_planes(x_q[:, :200], packed)
    with pytest.raises(ValueError, match="x_q must be int8"):
        planes_gemm.int_matmul_planes(x_q.float(), packed)
    with pytest.raises(ValueError, match=r"gamma_per_row must be fp32 \(8,\)"):
        planes_gemm.ternary_linear_planes(x_q, s_x, packed, gamma[:3])
    with pytest.raises(ValueError, match="its k must be 256"):
        planes_gemm.int_matmul_planes(x_q, packed, config=Tile(64, 16, 64))
