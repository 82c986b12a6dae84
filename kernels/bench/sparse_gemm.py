"""2:4 GEMMs on sparse tensor cores by our own kernel (sbn_kernels' sparse_gemm), beside what could replace it."""

from collections.abc import Iterator
from functools import partial

from forward_gemms import BF16, Gemm, gemms, peers_of
from goals import Goal
from harness import Benchmark, Call, Contender, Inputs, UnavailableError
from sbn_kernels import TernaryWeight
from sbn_kernels.gpu import forward_forms
from shapes import Selection

DEVICE = "cuda"
GOALS: tuple[Goal, ...] = ()


def _form(name: str, gemm: Gemm, inputs: Inputs) -> Call:
    """The GEMM by a form of `forward_forms`."""
    x_q, s_x, codes, gamma = (inputs[name] for name in ("x_q", "s_x", "codes", "gamma"))
    form = forward_forms.find_form(name)
    reason = form.why_not(gemm.n, gemm.m, *codes.shape)
    if reason is None and name != "dense" and not x_q.is_cuda:
        reason = "no CUDA device"
    if reason is not None:
        raise UnavailableError(reason)
    weight = TernaryWeight(codes, gamma, form=name, packed=form.pack(codes, gemm.m), group=gemm.m)
    return lambda: form.linear(x_q, s_x, weight, None, BF16)


def forms(gemm: Gemm, *names: str) -> tuple[Contender, ...]:
    """Contenders of ours for these forms, the first of which stands for us."""
    return tuple(Contender(name, partial(_form, name, gemm), gemm.scaled, ours=True) for name in names)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """All linear layers at 2:4; operations count the zeros, so that twice the ceiling is what sparsity allows."""
    for gemm in gemms(selection, 2, 4, 16384):
        contenders = (*forms(gemm, "mma_sp", "cusparselt", "dense"), *peers_of(gemm))
        case = gemm.case("sparse_gemm", bytes_a_weight=0.625)
        yield Benchmark(case, partial(gemm.inputs, selection.device), contenders)
