"""Linear layers for 1 to 32 tokens from packed weights: sbn_kernels' decode. Bound by reading the weights.

Bytes at least: the packed weight, X_q and Y. Formats for any N:M are measured at 6:8, those that need it at 2:4.
"""

from collections.abc import Iterator
from functools import partial

import torch
from forward_gemms import BF16, Gemm, bf16_linear
from goals import Goal, Measured
from harness import Benchmark, Call, Case, Contender, Inputs
from sbn_kernels.gpu.decode import decode as ours
from sbn_kernels.gpu.gemm import ternary_gemm
from shapes import MODELS, Linear, Selection

DEVICE = "cuda"
LARGE = 8 << 20
FORMATS = (("two_bit", 6, 8), ("trits", 6, 8), ("six_bit", 2, 4), ("triples", 2, 4))
"""Format, and the sparsity that it is measured at."""

MEMORY = (("H200", 4.8e12), ("H100 80GB HBM3", 3.35e12), ("A100-SXM4-80GB", 2.039e12))
"""Bytes a second from NVIDIA's data sheets, by what is in the device's name."""


def _packed(format: str, inputs: Inputs) -> Call:
    weight = ours.pack_weight(inputs["codes"], format)
    x_q, s_x, gamma = inputs["x_q"], inputs["s_x"], inputs["gamma"]
    return lambda: ours.decode_linear(x_q, s_x, weight, gamma, None, BF16)


def _int8(inputs: Inputs) -> Call:
    x_q, s_x, codes, gamma = (inputs[name] for name in ("x_q", "s_x", "codes", "gamma"))
    return lambda: ternary_gemm.ternary_linear(x_q, s_x, codes, gamma, None, BF16)


def _layers(selection: Selection) -> Iterator[tuple[Linear, str, int, int]]:
    """Layer, format, n, m. Every shape is compiled by itself, so that few are measured unless models are named."""
    if selection.models is not None:
        yield from ((layer, *form) for model in selection.models for layer in model.linears for form in FORMATS)
        return
    small, large = MODELS["0.5b"].linears, MODELS["3b"].linears
    yield from ((large[2], *form) for form in FORMATS)
    yield from ((layer, *form) for layer in (large[3], small[2]) for form in FORMATS[:2])


def _benchmark(gemm: Gemm, format: str, device: torch.device) -> Benchmark:
    out, width = gemm.layer.out_features, gemm.layer.in_features
    packed = int(ours.BYTES_PER_WEIGHT[format] * gemm.layer.weights)
    moved = packed + gemm.tokens * (width + 2 * out)
    sizes = (gemm.tokens, out, width, f"{gemm.n}:{gemm.m}", "bfloat16", moved, gemm.operations, "copy")
    contenders = (
        Contender(format, partial(_packed, format), gemm.scaled, ours=True),
        Contender("int8 GEMM", _int8, gemm.scaled, ours=True),
        bf16_linear(gemm),
    )
    case = Case("decode", f"{gemm.layer.name} {format}", *sizes)
    return Benchmark(case, partial(gemm.inputs, device), contenders, 0.3)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """Layers and formats at 1, 8 and 32 tokens."""
    for layer, format, n, m in _layers(selection):
        for tokens in selection.tokens_or(1, 8, 32):
            if tokens <= ours.MAX_TOKENS:
                yield _benchmark(Gemm(layer, tokens, n, m), format, selection.device)


def _share(measured: Measured) -> float | None:
    """The smallest share of the data sheet's bandwidth, of the best format at each layer and token count."""
    peak = next((rate for name, rate in MEMORY if name in measured.device), None)
    best: dict[tuple[str, int], float] = {}
    for result in measured.of("decode"):
        layer, _, format = result.case.layer.partition(" ")
        time = result.milliseconds(format)
        weights = result.case.out_features * result.case.in_features
        if peak is None or time is None or ours.BYTES_PER_WEIGHT[format] * weights < LARGE:
            continue
        share = result.case.bytes_moved / (time * 1e-3) / peak
        best[layer, result.case.tokens] = max(best.get((layer, result.case.tokens), 0.0), share)
    return min(best.values(), default=None)


GOALS = (Goal("over 8 MB packed: share of memory bandwidth", 0.6, _share, percent=True),)
