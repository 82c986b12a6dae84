"""Weight gradients from saved int8 activations: within the stated bound in floats, bit for bit in integers."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import kernel_cases
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.gpu.gemm import ternary_wgrad
from sbn_kernels.gpu.primitives import transpose
from sbn_kernels.gpu.primitives.tiles import Tile, gpu_family
from triton.runtime.errors import OutOfResources

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
TILE = Tile(64, 128, 32, warps=4)  # forced, so that tests on a GPU measure nothing; one test below lets it choose
INT8_TILE = Tile(64, 64, 64, warps=4)
SLICED = Tile(32, 32, 32, warps=4, slices=3)
TRANSPOSED = Tile(128, 64, 32, warps=4, transposed=True)
TILES = [Tile(32, 64, 32, warps=4), SLICED, Tile(64, 32, 64, warps=4, slices=8)]
TILES += [replace(tile, transposed=True) for tile in TILES]
SHAPES = [(96, 64, 64), (17, 33, 20), (1, 7, 896), (40, 4864, 3), (5, 3, 11008), (0, 4, 6)]
CASES = [(shape, dtype, TILE) for shape in SHAPES for dtype in UNIT]
CASES += [(shape, torch.bfloat16, TRANSPOSED) for shape in SHAPES] + [(SHAPES[1], dtype, TRANSPOSED) for dtype in UNIT]
TRANSPOSED_SHAPES = [(1, 1), (130, 70), (0, 5), (3, 11008)]
QUICK = [case for case in CASES if case[0] == SHAPES[1] or (case[0] in SHAPES[-2:] and case[1] == torch.bfloat16)]


def wgrad_operands(tokens: int, rows: int, features: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """dy [tokens, rows], s_x [tokens], x_q [tokens, features]."""
    g = torch.Generator().manual_seed(tokens)
    dy = (torch.randn(tokens, rows, generator=g) * 0.1).to(dtype)
    s_x = torch.rand(tokens, generator=g) * 0.02
    x_q = torch.randint(-128, 128, (tokens, features), dtype=torch.int8, generator=g)
    return dy.to(DEVICE), s_x.to(DEVICE), x_q.to(DEVICE)


def excess(
    dw: torch.Tensor, dy: torch.Tensor, s_x: torch.Tensor, x_q: torch.Tensor, before: torch.Tensor | None
) -> float:
    """Largest error over its bound (see the module): at most 1."""
    scaled = x_q.double() * s_x.double().unsqueeze(1)
    exact, absolute = dy.double().t() @ scaled, dy.double().abs().t() @ scaled.abs()
    bound = (UNIT[dy.dtype] * 1.01 + (len(dy) + 2) * 2.0**-24) * absolute
    bound += 2.0**-25 * (dy.dtype == torch.float16) * dy.double().abs().sum(dim=0).unsqueeze(1)
    if before is not None:
        exact = exact + before.double()
        bound = bound + 2.0**-24 * exact.abs()
    return float(((dw.double() - exact).abs() / (bound + 1e-30)).max())


@pytest.mark.parametrize(("shape", "dtype", "tile"), kernel_cases(CASES, QUICK, several=True))
def test_floating_gradient_is_within_its_bound(shape: tuple[int, int, int], dtype: torch.dtype, tile: Tile) -> None:
    dy, s_x, x_q = wgrad_operands(*shape, dtype)
    dw = ternary_wgrad.weight_gradient(dy, s_x, x_q, config=tile)
    assert dw.dtype == torch.float32
    assert dw.shape == shape[1:]
    assert excess(dw, dy, s_x, x_q, None) <= 1


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("shape", kernel_cases([(192, 64, 64), (70, 33, 50)], [(70, 33, 50)]), ids=str)
def test_tiles_slices_and_adding(shape: tuple[int, int, int], tile: Tile) -> None:
    dy, s_x, x_q = wgrad_operands(*shape, torch.bfloat16)
    first = ternary_wgrad.weight_gradient(dy, s_x, x_q, config=tile)
    assert excess(first, dy, s_x, x_q, None) <= 1
    assert_same_bits(first, ternary_wgrad.weight_gradient(dy, s_x, x_q, config=tile))
    before = torch.randn(shape[1:], device=DEVICE)
    total = before.clone()
    assert ternary_wgrad.weight_gradient(dy, s_x, x_q, total, config=tile) is total
    assert_same_bits(total, before + first)


def test_slices_are_added_in_their_order() -> None:
    dy = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]], device=DEVICE).repeat_interleave(32, dim=0)
    dy[torch.arange(96) % 32 > 0] = 0
    x_q, s_x = torch.ones(96, 1, dtype=torch.int8, device=DEVICE), torch.ones(96, device=DEVICE)
    # (2^24 + 1) - 2^24 in fp32 is 0; any other order gives 1.
    for tile in (SLICED, replace(SLICED, transposed=True)):
        assert ternary_wgrad.weight_gradient(dy, s_x, x_q, config=tile).item() == 0
        assert ternary_wgrad.weight_gradient(dy.roll(32, 0), s_x, x_q, config=tile).item() == 1


def test_small_integers_are_exact() -> None:
    dy = torch.randint(-4, 5, (50, 20)).to(DEVICE, torch.bfloat16)
    _, _, x_q = wgrad_operands(50, 20, 30, torch.bfloat16)
    s_x = torch.full((50,), 0.25, device=DEVICE)
    exact = (dy.double().t() @ (x_q.double() * 0.25)).float()
    for call in (
        (dy, s_x, x_q),
        (dy.view(5, 10, 20), s_x.view(5, 10), x_q.view(5, 10, 30)),
        (dy.t().contiguous().t(), s_x, x_q.t().contiguous().t()),
    ):
        assert_same_bits(ternary_wgrad.weight_gradient(*call, config=TILE), exact)
        assert_same_bits(ternary_wgrad.weight_gradient(*call, config=TRANSPOSED), exact)


def test_every_tile_for_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SBN_KERNELS_CACHE", str(tmp_path))
    for shape in ((256, 256, 256), (150, 130, 70)):
        dy, s_x, x_q = wgrad_operands(*shape, torch.bfloat16)
        before = torch.ones(shape[1:], device=DEVICE)
        for tile in (*ternary_wgrad.GRADIENT_TILES[gpu_family(dy.device)], None):
            with suppress(OutOfResources):
                dw = ternary_wgrad.weight_gradient(dy, s_x, x_q, before.clone(), config=tile)
                assert excess(dw, dy, s_x, x_q, before) <= 1, tile


@pytest.mark.parametrize(
    "shape", kernel_cases([(1, 1), (130, 70), (3, 11008), (0, 5)], [(1, 1), (130, 70), (0, 5)]), ids=str
)
def test_transpose(shape: tuple[int, int]) -> None:
    t = torch.randint(-128, 128, shape, dtype=torch.int8).to(DEVICE)
    transposed = transpose.transpose_int8(t)
    assert transposed.is_contiguous()
    assert_same_bits(transposed, t.t())
    assert_same_bits(transpose.transpose_int8(transposed.t()), transposed)
    filled = transpose.transpose_int8(t, multiple=96)
    assert filled.shape == (shape[1], -(-shape[0] // 96) * 96)
    assert_same_bits(filled[:, : shape[0]], transposed)
    assert not filled[:, shape[0] :].any()


@pytest.mark.parametrize("shape", [(96, 40, 64), (17, 33, 20), (896, 3, 5), (0, 4, 6)], ids=str)
def test_int8_gradient_has_the_bits_of_the_reference(shape: tuple[int, int, int]) -> None:
    dy, s_x, x_q = wgrad_operands(*shape, torch.float32)
    h = (dy * s_x.unsqueeze(1)).t().contiguous()
    h_q, scale = reference.quantize_rows(h) if len(dy) else (h.to(torch.int8), h.new_ones(len(h)))
    expected = reference.int8_matmul(h_q, x_q.t()).float() * scale.unsqueeze(1)
    assert_same_bits(ternary_wgrad.weight_gradient_int8(h_q, scale, x_q, config=INT8_TILE), expected)
    before = torch.randn(shape[1:], device=DEVICE)
    total = before.clone()
    assert ternary_wgrad.weight_gradient_int8(h_q, scale, x_q, total, config=INT8_TILE) is total
    assert_same_bits(total, before + expected)


@pytest.mark.parametrize("slice_tokens", [32, 40])
def test_int8_slices_are_each_exact(slice_tokens: int) -> None:
    _, _, x_q = wgrad_operands(96, 8, 48, torch.float32)
    h_q = wgrad_operands(8, 1, 96, torch.float32)[2].clamp(min=-127)
    scale = torch.rand(8, device=DEVICE)
    dw = ternary_wgrad.weight_gradient_int8(h_q, scale, x_q, config=INT8_TILE, slice_tokens=slice_tokens)
    expected = torch.zeros(8, 48, device=DEVICE)
    for h, x in zip(h_q.split(slice_tokens, 1), x_q.split(slice_tokens), strict=True):
        expected += reference.int8_matmul(h, x.t()).float() * scale.unsqueeze(1)
    assert_same_bits(dw, expected)


def test_operands_that_do_not_fit_are_named() -> None:
    dy, s_x, x_q = wgrad_operands(8, 4, 6, torch.float32)
    run = ternary_wgrad.weight_gradient
    with pytest.raises(ValueError, match="dy must be fp32, bf16 or fp16"):
        run(dy.double(), s_x, x_q)
    with pytest.raises(ValueError, match="x_q int8 of the same tokens"):
        run(dy, s_x, x_q[:7])
    with pytest.raises(ValueError, match=r"s_x must be fp32 \(8,\)"):
        run(dy, s_x[:7], x_q)
    with pytest.raises(ValueError, match=r"accumulate_into must be contiguous fp32 \(4, 6\)"):
        run(dy, s_x, x_q, torch.zeros(6, 4, device=DEVICE).t())
    with pytest.raises(ValueError, match="transpose_int8 takes an int8 matrix"):
        transpose.transpose_int8(dy)
    with pytest.raises(ValueError, match=r"takes scale fp32 \(6,\) and x_q \[8, in\]"):
        ternary_wgrad.weight_gradient_int8(x_q.t(), s_x, x_q)
