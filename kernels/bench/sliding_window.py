"""6:8 as windows of 2:4 (sbn_kernels' sliding_window): the GEMM, and repeating the activations that it needs."""

from collections.abc import Iterator
from functools import partial

from forward_gemms import Gemm, bf16_linear, gemms
from goals import Goal
from harness import Benchmark, Call, Case, Contender, Inputs
from sbn_kernels.gpu.gemm import sliding_window as ours
from shapes import Selection
from sparse_gemm import forms
from torch import Tensor

DEVICE = "cuda"
GOALS: tuple[Goal, ...] = ()
N, M = 6, 8


def _kernel(inputs: Inputs) -> Call:
    return lambda: ours.expand_activations_fast(inputs["x_q"], M)


def _unfold(inputs: Inputs) -> Call:
    return lambda: ours.expand_activations(inputs["x_q"], M)


def _expanded(inputs: Inputs) -> tuple[Tensor]:
    return (ours.expand_activations(inputs["x_q"], M),)


def _expansion(gemm: Gemm, selection: Selection) -> Benchmark:
    """Bytes at least: X_q read, 1.5 times as many written."""
    width = gemm.layer.in_features
    wide = ours.expanded_features(width, M)
    sizes = (gemm.tokens, 0, width, f"{N}:{M}", "int8", gemm.tokens * (width + wide), 0, "copy")
    contenders = (
        Contender("expand", _kernel, _expanded, ours=True),
        Contender("PyTorch unfold", _unfold, _expanded),
    )
    case = Case("sliding_window", f"{gemm.layer.name} expansion", *sizes)
    return Benchmark(case, partial(gemm.inputs, selection.device), contenders)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """All linear layers at 6:8, and the expansion of each input."""
    for gemm in gemms(selection, N, M, 16384):
        contenders = (
            *forms(gemm, "sliding_cusparselt", "sliding_mma_sp", "dense"),
            bf16_linear(gemm),
        )
        yield Benchmark(gemm.case("sliding_window"), partial(gemm.inputs, selection.device), contenders)
        if gemm.layer.name.endswith(("qkv", "down")):
            yield _expansion(gemm, selection)
