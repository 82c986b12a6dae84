"""2:4 products through cuSPARSELt with the contract's scales (sbn_kernels' cusparselt), beside the library alone."""

from collections.abc import Iterator
from functools import partial

import torch
from forward_products import peers_of, products
from goals import Goal
from harness import Benchmark, Call, Contender, Inputs, UnavailableError
from shapes import Selection
from sparse_gemm import forms

DEVICE = "cuda"
GOALS: tuple[Goal, ...] = ()


def _library(inputs: Inputs) -> Call:
    """The sparse product itself, int32 [tokens, out], no scales."""
    if not torch.backends.cusparselt.is_available():
        raise UnavailableError(f"PyTorch {torch.__version__} has no cuSPARSELt here")
    compressed, x_q = torch._cslt_compress(inputs["codes"]), inputs["x_q"]
    return lambda: torch._cslt_sparse_mm(compressed, x_q.t(), out_dtype=torch.int32, transpose_result=True)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """All linear layers at 2:4."""
    for product in products(selection, 2, 4, 2048, 16384):
        contenders = (
            *forms(product, "cusparselt", "dense"),
            Contender("cuSPARSELt alone", _library, product.integers),
            *peers_of(product),
        )
        case = product.case("cusparselt", bytes_a_weight=0.625)
        yield Benchmark(case, partial(product.inputs, selection.device), contenders)
