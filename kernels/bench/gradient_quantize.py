"""Rounding output gradients to int8, per token and per row of out: sbn_kernels' gradient_quantize.

Bytes at least: 2 read and 1 written per token for dY * gamma; 2 + 2 read (a maximum over the tokens comes first) and 1
written, transposed, for dY * s_x.
"""

from collections.abc import Iterator
from functools import partial

import peers
import torch
from activation_quantize import dequantized
from goals import Goal
from harness import Benchmark, Call, Case, Contender, Inputs, checked_rows
from sbn_kernels import reference
from sbn_kernels.gpu.quantize import gradient_quantize as ours
from shapes import Linear, Selection
from torch import Tensor

DEVICE = "cuda"
GOALS: tuple[Goal, ...] = ()


def _inputs(tokens: int, layer: Linear, device: torch.device) -> Inputs:
    generator = torch.Generator(device=device).manual_seed(0)
    return {
        "dy": torch.randn(tokens, layer.out_features, device=device, generator=generator).to(torch.bfloat16),
        "gamma": torch.rand(layer.out_features, device=device, generator=generator) + 0.01,
        "s_x": torch.rand(tokens, device=device, generator=generator) + 0.01,
    }


def _rows(inputs: Inputs) -> Call:
    return lambda: ours.quantize_gradient(inputs["dy"], inputs["gamma"])


def _columns(inputs: Inputs) -> Call:
    return lambda: ours.quantize_gradient_columns(inputs["dy"], inputs["s_x"])


def _reference_rows(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return reference.quantize_rows(inputs["dy"].float() * inputs["gamma"])


def _reference_columns(inputs: Inputs) -> tuple[Tensor, Tensor]:
    few = slice(0, checked_rows(inputs["dy"].shape[1], inputs["dy"].numel() << 8))
    return reference.quantize_rows((inputs["dy"][:, few].float() * inputs["s_x"].unsqueeze(1)).t().contiguous())


def _plain_rows(dy: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    g = dy.float() * gamma
    a = g.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    return (g * (127.0 / a)).round().to(torch.int8), (a / 127.0).squeeze(-1)


def _compiled_rows(inputs: Inputs) -> Call:
    return partial(peers.compiled(_plain_rows, inputs["dy"]), inputs["dy"], inputs["gamma"])


def _plain_columns(dy: Tensor, s_x: Tensor) -> tuple[Tensor, Tensor]:
    h = dy.float() * s_x.unsqueeze(1)
    a = h.abs().amax(dim=0, keepdim=True).clamp(min=1e-30)
    return (h * (127.0 / a)).round().to(torch.int8).t().contiguous(), (a / 127.0).squeeze(0)


def _compiled_columns(inputs: Inputs) -> Call:
    return partial(peers.compiled(_plain_columns, inputs["dy"]), inputs["dy"], inputs["s_x"])


def _both(name: str, inputs: Inputs) -> tuple[Tensor]:
    return dequantized(_reference_rows(inputs) if name == "rows" else _reference_columns(inputs))


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """dY of gate_up and down."""
    ways = (
        ("rows", 3, _rows, _reference_rows, _compiled_rows),
        ("columns", 5, _columns, _reference_columns, _compiled_columns),
    )
    for model in selection.models_or("0.5b", "3b"):
        for layer in model.linears[2:]:
            for tokens in selection.tokens_or(16384):
                for name, per_value, kernel, expected, compiled in ways:
                    contenders = (
                        Contender(name, kernel, expected, ours=True),
                        Contender("torch.compile", compiled, partial(_both, name), 1e-2, view=dequantized),
                    )
                    moved = per_value * tokens * layer.out_features
                    sizes = (tokens, layer.out_features, 0, "", "bfloat16", moved, 0, "copy")
                    case = Case("gradient_quantize", f"{layer.name} {name}", *sizes)
                    yield Benchmark(case, partial(_inputs, tokens, layer, selection.device), contenders)
