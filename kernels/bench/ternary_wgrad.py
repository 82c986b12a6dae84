"""Weight gradient dW = dY^T @ (s_x * X_q): sbn_kernels' ternary_wgrad, exact and int8."""

from collections.abc import Iterator
from functools import partial

from forward_products import Product, products
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


def _few(product: Product) -> slice:
    return slice(0, checked_rows(product.layer.out_features, product.operations))


def _expected(product: Product, mode: str, inputs: Inputs) -> tuple[Tensor]:
    return (reference.weight_gradient(inputs["dy"][:, _few(product)], inputs["x_q"], inputs["s_x"], mode),)


def _dense(product: Product, inputs: Inputs) -> tuple[Tensor]:
    return (inputs["dy"][:, _few(product)].float().t() @ inputs["x"].float(),)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """All linear layers; bytes at least: dY and X_q read, dW written in fp32 (bf16 by the peer)."""
    for product in products(selection, 6, 8, 16384):
        out, width = product.layer.out_features, product.layer.in_features
        contenders = (
            Contender("exact", _exact, partial(_expected, product, "exact"), 1e-2, ours=True),
            Contender("int8", _int8, partial(_expected, product, "int8"), ours=True),
            Contender("bf16", _bf16, partial(_dense, product), 1e-2),
        )
        moved = product.tokens * (2 * out + width) + 4 * product.layer.weights
        sizes = (product.tokens, out, width, "", "bfloat16", moved, product.operations, "bf16")
        case = Case("ternary_wgrad", product.layer.name, *sizes)
        yield Benchmark(case, partial(with_gradient, product, selection.device), contenders)
