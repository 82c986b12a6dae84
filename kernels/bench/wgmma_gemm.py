"""Forward GEMM on Hopper with its multiplications kept in flight: sbn_kernels' wgmma_gemm, beside ternary_gemm."""

from collections.abc import Iterator
from functools import partial

import ternary_gemm
from forward_gemms import gemms, peers_of
from harness import Benchmark
from shapes import Selection
from sparse_gemm import forms

DEVICE = "cuda"
GOALS = (ternary_gemm.goal("wgmma_gemm", "wgmma"),)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """All linear layers at 6:8."""
    for gemm in gemms(selection, 6, 8, 2048, 16384):
        contenders = (*forms(gemm, "wgmma", "dense"), *peers_of(gemm))
        yield Benchmark(gemm.case("wgmma_gemm"), partial(gemm.inputs, selection.device), contenders)
