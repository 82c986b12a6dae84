"""Input gradients from ternary codes: against the exact formula in fp64, within the stated bound."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from cases import kernel_cases
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.formats.planes import pack_planes
from sbn_kernels.gpu.gemm import ternary_dgrad, ternary_gemm
from sbn_kernels.gpu.primitives.tiles import Tile, gpu_family
from triton.runtime.errors import OutOfResources

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
TILE = Tile(64, 32, 64, warps=4)  # forced, so that tests on a GPU measure nothing; one test below lets it choose
PARTS = {
    "one part": None,
    "two parts": ((0, 128, 0), (128, 64, 1)),
    "groups of a fused projection": ((0, 64, 0), (64, 64, 1), (128, 64, 0)),
    "parts that begin anywhere": ((0, 100, 0), (100, 92, 1)),
    "runs of one part": ((0, 100, 3), (100, 92, 3)),
}
MODES = ["uniform", "segments", "segments", "general", "uniform"]


def dgrad_operands(tokens: int, rows: int, features: int, dtype: torch.dtype, parts: tuple | None = None) -> tuple:
    """dy, gamma per row with one value a part, codes transposed [features, rows]."""
    g = torch.Generator().manual_seed(tokens + rows)
    dy = (torch.randn(tokens, rows, generator=g) * 0.1).to(dtype)
    codes_t = torch.randint(-1, 2, (features, rows), dtype=torch.int8, generator=g)
    gamma = torch.empty(rows)
    for start, length, part in parts or ((0, rows, 0),):
        gamma[start : start + length] = [0.03, 0.7, 11.0, 0.0002][part]
    return dy.to(DEVICE), gamma.to(DEVICE), codes_t.to(DEVICE)


def excess(
    dx: torch.Tensor, dy: torch.Tensor, gamma: torch.Tensor, codes_t: torch.Tensor, runs: int, general: bool
) -> float:
    """Largest error over its bound (see the module): at most 1."""
    terms = dy.double() * gamma.double()
    exact, absolute = terms @ codes_t.double().t(), terms.abs() @ codes_t.double().abs().t()
    unit = UNIT[dy.dtype]
    bound = unit * exact.abs() + (dy.shape[-1] + 2 * runs + 2) * 2.0**-24 * absolute + general * unit * absolute
    # The result's own rounding is relative to the result, which is off by the rest of the bound.
    return float(
        ((dx.double() - exact).abs() / (bound * (1 + unit) + 2.0**-25 * (dy.dtype == torch.float16) + 1e-30)).max()
    )


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize(("name", "mode"), zip(PARTS, MODES, strict=True))
def test_every_way_of_scaling_is_within_its_bound(name: str, mode: str, dtype: torch.dtype) -> None:
    parts = PARTS[name]
    dy, gamma, codes_t = dgrad_operands(40, 192, 72, dtype, parts)
    bounds = ternary_dgrad.merged_parts(parts, 192)
    assert ternary_dgrad.scale_mode(bounds, TILE.k) == mode
    dx = ternary_dgrad.ternary_dgrad(dy, gamma, codes_t, parts, config=TILE)
    assert dx.dtype == dtype
    assert dx.shape == (40, 72)
    assert excess(dx, dy, gamma, codes_t, len(bounds) - 1, mode == "general") <= 1


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize(("rows", "features"), [(896, 5), (33, 64), (4864, 3), (11008, 2), (64, 33)])
def test_awkward_sizes(tokens: int, rows: int, features: int) -> None:
    dy, gamma, codes_t = dgrad_operands(tokens, rows, features, torch.bfloat16)
    assert excess(ternary_dgrad.ternary_dgrad(dy, gamma, codes_t, config=TILE), dy, gamma, codes_t, 1, False) <= 1


def test_sums_of_small_integers_are_exact_and_rounded_once() -> None:
    dy = torch.randint(-8, 9, (20, 130)).to(DEVICE, torch.bfloat16)
    codes_t = torch.randint(-1, 2, (40, 130), dtype=torch.int8, device=DEVICE)
    gamma = torch.full((130,), 0.5, device=DEVICE)
    exact = (dy.double() @ codes_t.double().t()) * 0.5
    assert_same_bits(ternary_dgrad.ternary_dgrad(dy, gamma, codes_t, config=TILE), exact.to(torch.bfloat16))
    gamma[64:] = 0.25
    exact = (dy.double() * gamma.double()) @ codes_t.double().t()
    for parts in (((0, 64, 0), (64, 66, 1)), ((0, 60, 0), (60, 4, 1), (64, 66, 2))):
        dx = ternary_dgrad.ternary_dgrad(dy, gamma, codes_t, parts, config=TILE)
        assert_same_bits(dx, exact.to(torch.bfloat16))


def test_rounding_to_bf16_is_half_to_even() -> None:
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 256.0 - 2**-12, -1 - 2**-8], device=DEVICE)
    identity = torch.ones(1, 1, dtype=torch.int8, device=DEVICE)
    for value in values:
        one = torch.ones(1, 1, dtype=torch.bfloat16, device=DEVICE)
        dx = ternary_dgrad.ternary_dgrad(one, value.view(1), identity, config=TILE)
        assert dx.item() == value.to(torch.bfloat16).item()


def test_nan_stays_in_its_token() -> None:
    dy, gamma, codes_t = dgrad_operands(5, 192, 8, torch.bfloat16, PARTS["two parts"])
    dy[3, 7] = torch.nan
    dx = ternary_dgrad.ternary_dgrad(dy, gamma, codes_t.fill_(1), PARTS["two parts"], config=TILE)
    assert dx.isnan().any(dim=1).tolist() == dx.isnan().all(dim=1).tolist() == [False, False, False, True, False]


def test_leading_dimensions_strides_and_no_tokens() -> None:
    dy, gamma, codes_t = dgrad_operands(24, 32, 10, torch.float32)

    def run(dy: torch.Tensor, codes_t: torch.Tensor) -> torch.Tensor:
        return ternary_dgrad.ternary_dgrad(dy, gamma, codes_t, config=TILE)

    whole = run(dy, codes_t)
    assert_same_bits(run(dy.view(2, 12, 32), codes_t), whole.view(2, 12, 10))
    assert_same_bits(run(dy.t().contiguous().t(), codes_t.t().contiguous().t()), whole)
    same = dy[:1].expand(24, 32)
    assert_same_bits(run(same, codes_t), run(same.clone(), codes_t))
    assert run(dy[:0], codes_t).shape == (0, 10)


@pytest.mark.parametrize("dtype", kernel_cases(UNIT, [torch.bfloat16, torch.float32]), ids=str)
def test_every_tile_for_this_machine(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SBN_KERNELS_CACHE", str(tmp_path))
    parts = ((0, 128, 0), (128, 192, 1))
    dy, gamma, codes_t = dgrad_operands(100, 320, 130, dtype, parts)
    planes_t = pack_planes(codes_t)
    for tile in (*ternary_dgrad.DGRAD_TILES[gpu_family(dy.device)], None):
        for codes in (codes_t, planes_t):
            if dtype == torch.float32 and tile is not None:
                continue  # the tiles are for types of 16 bits
            if tile is not None and codes is planes_t and tile.k != 64:
                continue
            with suppress(OutOfResources):
                dx = ternary_dgrad.ternary_dgrad(dy, gamma, codes, parts, config=tile)
                assert excess(dx, dy, gamma, codes_t, 2, dtype == torch.float32) <= 1, tile


def test_int8_gradients_go_through_the_forward_kernel() -> None:
    dy, gamma, codes_t = dgrad_operands(20, 192, 24, torch.float32, PARTS["two parts"])
    g_q, s = reference.quantize_rows(dy * gamma)
    dx = ternary_gemm.ternary_linear(g_q, s, codes_t, torch.ones(24, device=DEVICE), config=Tile(64, 64, 64))
    assert_same_bits(dx, (g_q.double() @ codes_t.double().t()).float() * s.unsqueeze(1))
    exact = (dy.double() * gamma.double()) @ codes_t.double().t()
    bound = codes_t.double().abs().sum(dim=1) * s.double().unsqueeze(1) * 0.5001 + 1e-6 * exact.abs()
    assert bool(((dx.double() - exact).abs() <= bound).all())


def test_operands_that_do_not_fit_are_named() -> None:
    dy, gamma, codes_t = dgrad_operands(4, 32, 8, torch.float32)
    run = ternary_dgrad.ternary_dgrad
    with pytest.raises(ValueError, match="dy must be fp32, bf16 or fp16"):
        run(dy.double(), gamma, codes_t)
    with pytest.raises(ValueError, match=r"codes_t int8 \[in, 32\] or its planes, got torch.int8 \(32, 8\)"):
        run(dy, gamma, codes_t.t())
    with pytest.raises(ValueError, match=r"gamma_per_row must be fp32 \(32,\)"):
        run(dy, gamma[:1], codes_t)
    for parts in (((0, 16, 0),), ((0, 16, 0), (15, 17, 1)), ((1, 31, 0),), ((0, 32, 0), (32, 0, 1))):
        with pytest.raises(ValueError, match="are not consecutive runs"):
            run(dy, gamma, codes_t, parts)
