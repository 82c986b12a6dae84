"""Input gradient dX = (dY * gamma) @ C: sbn_kernels' ternary_dgrad, and the int8 form on the forward's product."""

from collections.abc import Iterator
from functools import partial
from itertools import accumulate

import torch
from forward_products import BF16, Product, products
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


def with_gradient(product: Product, device: torch.device) -> Inputs:
    """The product's inputs, and dy bf16 [tokens, out]."""
    generator = torch.Generator(device=device).manual_seed(1)
    dy = torch.randn(product.tokens, product.layer.out_features, device=device, generator=generator).to(BF16)
    return {**product.inputs(device), "dy": dy}


def _exact(product: Product, inputs: Inputs) -> Call:
    sizes = product.layer.parts
    starts = accumulate((0, *sizes[:-1]))
    runs = tuple((start, rows, i) for i, (start, rows) in enumerate(zip(starts, sizes, strict=True)))
    turned = ternary_wgrad.transpose_int8(inputs["codes"])
    return lambda: ours.ternary_dgrad(inputs["dy"], inputs["gamma"], turned, runs)


def _int8(inputs: Inputs) -> Call:
    turned = ternary_wgrad.transpose_int8(inputs["codes"])
    ones = torch.ones(len(turned), device=turned.device)

    def call() -> Tensor:
        g_q, s = gradient_quantize.quantize_gradient(inputs["dy"], inputs["gamma"])
        return ternary_gemm.ternary_linear(g_q, s, turned, ones, None, BF16)

    return call


def _bf16(inputs: Inputs) -> Call:
    return lambda: inputs["dy"] @ inputs["w"]


def _few(product: Product) -> slice:
    return slice(0, checked_rows(product.tokens, product.operations))


def _expected(product: Product, mode: str, inputs: Inputs) -> tuple[Tensor]:
    return (reference.input_gradient(inputs["dy"][_few(product)], inputs["codes"], inputs["gamma"], None, mode),)


def _dense(product: Product, inputs: Inputs) -> tuple[Tensor]:
    return (inputs["dy"][_few(product)].float() @ inputs["w"].float(),)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """All linear layers; bytes at least: dY and the codes read, dX written."""
    for product in products(selection, 6, 8, 16384):
        out, width = product.layer.out_features, product.layer.in_features
        contenders = (
            Contender("exact", partial(_exact, product), partial(_expected, product, "exact"), 1e-2, ours=True),
            Contender("int8", _int8, partial(_expected, product, "int8"), ours=True),
            Contender("bf16", _bf16, partial(_dense, product), 1e-2),
        )
        moved = 2 * product.tokens * (out + width) + product.layer.weights
        sizes = (product.tokens, out, width, "6:8", "bfloat16", moved, product.operations, "bf16")
        case = Case("ternary_dgrad", product.layer.name, *sizes)
        yield Benchmark(case, partial(with_gradient, product, selection.device), contenders)
