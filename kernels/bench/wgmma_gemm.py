"""Forward product on Hopper with its multiplications kept in flight: sbn_kernels' wgmma_gemm, beside ternary_gemm."""

from collections.abc import Iterator
from functools import partial

import ternary_gemm
from forward_products import peers_of, products
from harness import Benchmark
from shapes import Selection
from sparse_gemm import forms

DEVICE = "cuda"
GOALS = (ternary_gemm.goal("wgmma_gemm", "wgmma"),)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """All linear layers at 6:8."""
    for product in products(selection, 6, 8, 2048, 16384):
        contenders = (*forms(product, "wgmma", "dense"), *peers_of(product))
        yield Benchmark(product.case("wgmma_gemm"), partial(product.inputs, selection.device), contenders)
