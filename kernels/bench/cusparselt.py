"""2:4 GEMMs through cuSPARSELt with the contract's scales (sbn_kernels' cusparselt), beside the library alone."""

from collections.abc import Iterator
from functools import partial

import torch
from forward_gemms import gemms, peers_of
from goals import Goal
from harness import Benchmark, Call, Contender, Inputs, UnavailableError
from shapes import Selection
from sparse_gemm import forms

DEVICE = "cuda"
GOALS: tuple[Goal, ...] = ()


def _library(inputs: Inputs) -> Call:
    """The sparse GEMM itself, int32 [tokens, out], no scales."""
    if not torch.backends.cusparselt.is_available():
        raise UnavailableError(f"PyTorch {torch.__version__} has no cuSPARSELt here")
    compressed, x_q = torch._cslt_compress(inputs["codes"]), inputs["x_q"]
    return lambda: torch._cslt_sparse_mm(compressed, x_q.t(), out_dtype=torch.int32, transpose_result=True)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """All linear layers at 2:4."""
    for gemm in gemms(selection, 2, 4, 2048, 16384):
        contenders = (
            *forms(gemm, "cusparselt", "dense"),
            Contender("cuSPARSELt alone", _library, gemm.integers),
            *peers_of(gemm),
        )
        case = gemm.case("cusparselt", bytes_a_weight=0.625)
        yield Benchmark(case, partial(gemm.inputs, selection.device), contenders)
