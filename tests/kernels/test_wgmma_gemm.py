"""Hopper's forward in Gluon: its source on an emulated processor, its machine code, and on a GPU, itself."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hopper_machine import Barrier, DeadlockError, Descriptor, Machine, Pointer
from operands import operands
from same_bits import assert_same_bits
from sbn_kernels import reference
from sbn_kernels.gpu import forward_forms
from sbn_kernels.gpu.gemm import wgmma_gemm
from sbn_kernels.gpu.primitives.tiles import Tile

KERNELS = Path(__file__).parents[2] / "kernels"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
TIMES = list(itertools.product((True, False), repeat=2))


class Run:
    """The kernel's source on emulated processors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, programs: int, times: tuple[bool, bool]) -> None:
        self.patch, self.programs, self.times = monkeypatch, programs, times
        self.slack = 0  # added to the wgmma that a wait leaves running
        self.parity = 0  # added to the phases that are waited for

    def __call__(
        self, tile: Tile, x_q: torch.Tensor, codes: torch.Tensor, *scales: torch.Tensor | None
    ) -> torch.Tensor:
        dtype = scales[3].dtype if len(scales) > 3 and scales[3] is not None else torch.float32
        out = torch.full((len(x_q), len(codes)), torch.nan, dtype=dtype)
        writes = torch.zeros(out.shape, dtype=torch.int64)
        kernel = wgmma_gemm.wgmma_gemm_kernel.fn
        pointers = [None if s is None else Pointer(s) for s in scales[:3]]
        for program in range(self.programs):
            machine = Machine(program, self.programs, eager_copies=self.times[0], eager_products=self.times[1])
            with self.patch.context() as patch:
                machine.install(patch, wgmma_gemm, ["copy_step", "store_columns"])
                self.sabotage(machine, patch)
                kernel(
                    Descriptor(x_q, [tile.m, tile.k]),
                    Descriptor(codes, [tile.n, tile.k]),
                    Pointer(out.view(-1), 0, writes),
                    *(*pointers, *x_q.shape[:1], *codes.shape),
                    *(tile.m, tile.n, tile.k, tile.stages, tile.group, tile.n // 4, None, None, None),
                )
            assert not machine.in_flight
        assert writes.eq(1).all(), "an element was stored twice, or never"
        return out

    def sabotage(self, machine: Machine, patch: pytest.MonkeyPatch) -> None:
        def wait_products(num_outstanding: int, deps: list) -> object:
            return machine.wait_products(num_outstanding + (self.slack if num_outstanding else 0), deps)

        def wait(barrier: Barrier, parity: int) -> None:
            machine.wait(barrier, (parity + self.parity) % 2)

        patch.setattr(wgmma_gemm, "warpgroup_mma_wait", wait_products)
        patch.setattr(wgmma_gemm.mbarrier, "wait", wait)


@pytest.mark.parametrize("times", TIMES, ids=str)
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_every_slot_is_awaited_and_none_is_overwritten_in_use(
    monkeypatch: pytest.MonkeyPatch, steps: int, stages: int, times: tuple[bool, bool]
) -> None:
    tile = Tile(8, 16, 32, stages=stages, group=2)
    x_q, s_x, codes, gamma, bias = operands(19, 50, 32 * steps - 16, device="cpu")  # 3 x 4 tiles, ragged everywhere
    for programs in (1, 5):
        run = Run(monkeypatch, programs, times)
        assert_same_bits(
            run(tile, x_q, codes, s_x, gamma, bias), reference.ternary_linear(x_q, s_x, codes, gamma, bias)
        )


@pytest.mark.parametrize("shape", [(1, 1, 16), (17, 33, 896), (5, 896, 48), (40, 7, 4864), (3, 2, 11008)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_source_gives_the_bits_of_the_reference(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x_q, s_x, codes, gamma, bias = operands(*shape, device="cpu")
    run = Run(monkeypatch, 3, (False, False))
    for added in (None, bias, bias.to(dtype)):
        y = run(Tile(16, 64, 128, stages=3), x_q, codes, s_x, gamma, added, torch.empty(0, dtype=dtype))
        assert_same_bits(y, reference.ternary_linear(x_q, s_x, codes, gamma, added, dtype))
    sums = run(Tile(16, 64, 128, stages=3), x_q, codes, None, None, None)
    assert_same_bits(sums, reference.int_matmul(x_q, codes))


def test_the_emulation_sees_a_missing_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    x_q, s_x, codes, gamma, bias = operands(19, 50, 240, device="cpu")
    expected = reference.ternary_linear(x_q, s_x, codes, gamma, bias)
    overwriting = Run(monkeypatch, 1, (True, False))
    overwriting.slack = 1
    assert not torch.equal(overwriting(Tile(8, 16, 32, stages=3), x_q, codes, s_x, gamma, bias), expected)
    early = Run(monkeypatch, 1, (False, True))
    early.parity = 1
    with pytest.raises((DeadlockError, AssertionError)):
        early(Tile(8, 16, 32, stages=3), x_q, codes, s_x, gamma, bias)


def spread(bases: list[list[int]]) -> torch.Tensor:
    """[2^len(bases), 2]: row and column of each value of a layout's index."""
    places = torch.zeros(1, 2, dtype=torch.long)
    for base in bases:
        places = torch.cat([places, places ^ torch.tensor(base)])
    return places


@pytest.mark.parametrize("tile", wgmma_gemm.WGMMA_TILES, ids=lambda tile: tile.name)
def test_results_stay_in_their_warp_and_group_of_four(tile: Tile) -> None:
    columns = wgmma_gemm.part_columns(tile)
    layout = wgmma_gemm.result_layout(tile, columns, 2)
    registers, lanes, warps = (spread(b) for b in (layout.reg_bases, layout.lane_bases, layout.warp_bases))
    assert (len(lanes), len(warps)) == (32, tile.warps)
    assert registers[:8].tolist() == [[0, i] for i in range(8)]
    places = warps[:, None, None] ^ lanes[None, :, None] ^ registers[None, None, :]
    row, column = places.unbind(-1)
    assert_same_bits((row * columns + column).flatten().sort().values, torch.arange(tile.m * columns))
    # PTX ISA, wgmma's D fragment: of 64 rows a warp has 16 w to 16 w + 15, of which four lanes share r and r + 8.
    assert_same_bits(row // 16 % tile.warps, torch.arange(tile.warps)[:, None, None].expand_as(row))
    assert_same_bits(row % 8, (torch.arange(32) // 4)[None, :, None].expand_as(row))


@pytest.mark.slow_on_cpu  # three builds; test_inspection.py inspects one of them
def test_machine_code_keeps_products_in_flight() -> None:
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(KERNELS))))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, "-m", "sbn_kernels.inspection", "--architectures", "90", "--kernel"]
    done = subprocess.run(
        [*command, "wgmma_gemm[bf16 128x"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("IGMMA") == sum(tile.m == 128 for tile in wgmma_gemm.WGMMA_TILES)


@pytest.mark.parametrize(
    ("waits", "accepted"),
    [
        ("wgmma.wait_group.sync.aligned 1;\nbar.sync 0;\ncp.async.bulk.tensor.2d", True),
        ("wgmma.wait_group.sync.aligned 0;\nbar.sync 0;\ncp.async.bulk.tensor.2d", False),
        ("wgmma.wait_group.sync.aligned 1;\ncp.async.bulk.tensor.2d\nbar.sync 0;", False),
        ("wgmma.wait_group.sync.aligned 1;\nwgmma.mma_async\nbar.sync 0;\ncp.async.bulk.tensor.2d", False),
    ],
)
def test_what_is_asked_of_the_ptx(waits: str, accepted: bool) -> None:
    assert bool(re.search(wgmma_gemm.PRODUCT_STAYS_IN_FLIGHT, waits, re.DOTALL)) is accepted


@pytest.mark.skipif(HOPPER, reason="this machine has the GPU")
def test_machines_and_widths_without_it_are_named() -> None:
    x_q, s_x, codes, gamma, bias = operands(4, 8, 32, device="cpu")
    with pytest.raises(ValueError, match=r"a layer of 8 x 32: its instructions are those of compute capability 9\.0"):
        wgmma_gemm.ternary_linear_wgmma(x_q, s_x, codes, gamma, bias)
    with pytest.raises(ValueError, match="capability 9.0"):
        wgmma_gemm.int_matmul_wgmma(x_q, codes)
    with pytest.raises(ValueError, match="form 'wgmma' cannot serve a layer of 8 x 32: its instructions"):
        forward_forms.pack_form("wgmma", codes, 6, 8)


def test_operands_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    x_q, s_x, codes, gamma, bias = operands(4, 8, 40, device="cpu")
    run = wgmma_gemm.ternary_linear_wgmma
    with pytest.raises(ValueError, match="in_features in multiples of 16 up to 131072, not 40"):
        run(x_q, s_x, codes, gamma, bias)
    with pytest.raises(ValueError, match="int8 operands, got torch.float32"):
        run(x_q.float(), s_x, codes, gamma)
    with pytest.raises(ValueError, match="do not share their last dimension"):
        run(x_q[:, :32], s_x, codes, gamma)
    with pytest.raises(ValueError, match="out_dtype must be fp32, bf16 or fp16, got torch.int32"):
        run(x_q, s_x, codes, gamma, bias, torch.int32)
    with pytest.raises(ValueError, match="tensors of one CUDA device, got cpu and cpu"):
        run(x_q[:, :32], s_x, codes[:, :32], gamma)
    assert forward_forms.find_form("wgmma").why_not(6, 8, 8, 48) is None
    assert "not 40" in str(forward_forms.find_form("wgmma").why_not(6, 8, 8, 40))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="needs compute capability 9.0")
@pytest.mark.parametrize("tile", wgmma_gemm.WGMMA_TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize(
    "shape", [(1, 1, 16), (17, 33, 896), (300, 300, 4864), (5, 896, 11008), (4097, 2056, 1040)], ids=str
)
def test_on_a_gpu(shape: tuple[int, int, int], tile: Tile) -> None:
    x_q, s_x, codes, gamma, bias = operands(*shape)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for added in (None, bias):
            y = wgmma_gemm.ternary_linear_wgmma(x_q, s_x, codes, gamma, added, dtype, config=tile)
            assert_same_bits(y, reference.ternary_linear(x_q, s_x, codes, gamma, added, dtype))
    assert_same_bits(wgmma_gemm.int_matmul_wgmma(x_q, codes, config=tile), reference.int_matmul(x_q, codes))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="needs compute capability 9.0")
def test_views_and_nothing_to_do_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SBN_KERNELS_CACHE", str(tmp_path))
    x_q, s_x, codes, gamma, _ = operands(24, 10, 48)
    whole = reference.ternary_linear(x_q, s_x, codes, gamma)
    run = wgmma_gemm.ternary_linear_wgmma
    assert_same_bits(run(x_q.view(2, 3, 4, 48), s_x.view(2, 3, 4), codes, gamma), whole.view(2, 3, 4, 10))
    assert_same_bits(run(x_q[1:], s_x[1:], codes, gamma), whole[1:])
    assert_same_bits(
        run(x_q[:, :32], s_x, codes[:, :32], gamma), reference.ternary_linear(x_q[:, :32], s_x, codes[:, :32], gamma)
    )
    unaligned = torch.cat([x_q.flatten()[:1], x_q.flatten()])[1:].view(24, 48)
    assert_same_bits(run(unaligned, s_x, codes, gamma), whole)
    assert run(x_q[:0], s_x[:0], codes, gamma).shape == (0, 10)
