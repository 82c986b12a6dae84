"""Weight gradient dW = dY^T @ (s_x * X_q): sbn_kernels' ternary_wgrad, exact and int8."""

from collections.abc import Iterator
from functools import partial

from forward_gemms import Gemm, gemms
from goals import Goal
from harness import Benchmark, Call, Case, Contender, Inputs, checked_rows
from sbn_kernels import reference
from sbn_kernels.gpu.gemm import ternary_wgrad as ours
from sbn_kernels.gpu.quantize import gradient_quantize
from shapes import Selection
from ternary_dgrad import with_gradient
from torch import Tensor

DEVICE = "cuda"
GOALS: tuple[Goal, ...] = ()


def _exact(inputs: Inputs) -> Call:
    return lambda: ours.weight_gradient(inputs["dy"], inputs["s_x"], inputs["x_q"])


def _int8(inputs: Inputs) -> Call:
    def call() -> Tensor:
        h_q, s = gradient_quantize.quantize_gradient_columns(inputs["dy"], inputs["s_x"])
        return ours.weight_gradient_int8(h_q, s, inputs["x_q"])

    return call


def _bf16(inputs: Inputs) -> Call:
    return lambda: inputs["dy"].t() @ inputs["x"]


def _few(gemm: Gemm) -> slice:
    return slice(0, checked_rows(gemm.layer.out_features, gemm.operations))


def _expected(gemm: Gemm, mode: str, inputs: Inputs) -> tuple[Tensor]:
    return (reference.weight_gradient(inputs["dy"][:, _few(gemm)], inputs["x_q"], inputs["s_x"], mode),)


def _dense(gemm: Gemm, inputs: Inputs) -> tuple[Tensor]:
    return (inputs["dy"][:, _few(gemm)].float().t() @ inputs["x"].float(),)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """All linear layers; bytes at least: dY and X_q read, dW written in fp32 (bf16 by the peer)."""
    for gemm in gemms(selection, 6, 8, 16384):
        out, width = gemm.layer.out_features, gemm.layer.in_features
        contenders = (
            Contender("exact", _exact, partial(_expected, gemm, "exact"), 1e-2, ours=True),
            Contender("int8", _int8, partial(_expected, gemm, "int8"), ours=True),
            Contender("bf16", _bf16, partial(_dense, gemm), 1e-2),
        )
        moved = gemm.tokens * (2 * out + width) + 4 * gemm.layer.weights
        sizes = (gemm.tokens, out, width, "", "bfloat16", moved, gemm.operations, "bf16")
        case = Case("ternary_wgrad", gemm.layer.name, *sizes)
        yield Benchmark(case, partial(with_gradient, gemm, selection.device), contenders)
