"""Input gradient dX = (dY * gamma) @ C: sbn_kernels' ternary_dgrad, and the int8 form on the forward's GEMM."""

from collections.abc import Iterator
from functools import partial
from itertools import accumulate

import torch
from forward_gemms import BF16, Gemm, gemms
from goals import Goal
from harness import Benchmark, Call, Case, Contender, Inputs, checked_rows
from sbn_kernels import reference
from sbn_kernels.gpu.gemm import ternary_dgrad as ours
from sbn_kernels.gpu.gemm import ternary_gemm, ternary_wgrad
from sbn_kernels.gpu.quantize import gradient_quantize
from shapes import Selection
from torch import Tensor

DEVICE = "cuda"
GOALS: tuple[Goal, ...] = ()


def with_gradient(gemm: Gemm, device: torch.device) -> Inputs:
    """The GEMM's inputs, and dy bf16 [tokens, out]."""
    generator = torch.Generator(device=device).manual_seed(1)
    dy = torch.randn(gemm.tokens, gemm.layer.out_features, device=device, generator=generator).to(BF16)
    return {**gemm.inputs(device), "dy": dy}


def _exact(gemm: Gemm, inputs: Inputs) -> Call:
    sizes = gemm.layer.parts
    starts = accumulate((0, *sizes[:-1]))
    runs = tuple((start, rows, i) for i, (start, rows) in enumerate(zip(starts, sizes, strict=True)))
    codes_t = ternary_wgrad.transpose_int8(inputs["codes"])
    return lambda: ours.ternary_dgrad(inputs["dy"], inputs["gamma"], codes_t, runs)


def _int8(inputs: Inputs) -> Call:
    codes_t = ternary_wgrad.transpose_int8(inputs["codes"])
    ones = torch.ones(len(codes_t), device=codes_t.device)

    def call() -> Tensor:
        g_q, s = gradient_quantize.quantize_gradient(inputs["dy"], inputs["gamma"])
        return ternary_gemm.ternary_linear(g_q, s, codes_t, ones, None, BF16)

    return call


def _bf16(inputs: Inputs) -> Call:
    return lambda: inputs["dy"] @ inputs["w"]


def _few(gemm: Gemm) -> slice:
    return slice(0, checked_rows(gemm.tokens, gemm.operations))


def _expected(gemm: Gemm, mode: str, inputs: Inputs) -> tuple[Tensor]:
    return (reference.input_gradient(inputs["dy"][_few(gemm)], inputs["codes"], inputs["gamma"], None, mode),)


def _dense(gemm: Gemm, inputs: Inputs) -> tuple[Tensor]:
    return (inputs["dy"][_few(gemm)].float() @ inputs["w"].float(),)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """All linear layers; bytes at least: dY and the codes read, dX written."""
    for gemm in gemms(selection, 6, 8, 16384):
        out, width = gemm.layer.out_features, gemm.layer.in_features
        contenders = (
            Contender("exact", partial(_exact, gemm), partial(_expected, gemm, "exact"), 1e-2, ours=True),
            Contender("int8", _int8, partial(_expected, gemm, "int8"), ours=True),
            Contender("bf16", _bf16, partial(_dense, gemm), 1e-2),
        )
        moved = 2 * gemm.tokens * (out + width) + gemm.layer.weights
        sizes = (gemm.tokens, out, width, "6:8", "bfloat16", moved, gemm.operations, "bf16")
        case = Case("ternary_dgrad", gemm.layer.name, *sizes)
        yield Benchmark(case, partial(with_gradient, gemm, selection.device), contenders)
