"""Rounding activations to int8, one scale a token: sbn_kernels' activation_quantize. 2 bytes read, 1 written."""

from collections.abc import Iterator
from functools import partial

import peers
import torch
from goals import Goal, Measured, least_share
from harness import Benchmark, Call, Case, Contender, Inputs
from sbn_kernels import reference
from sbn_kernels.gpu.quantize import activation_quantize as ours
from shapes import Selection
from torch import Tensor

DEVICE = "cuda"


def tokens_of(tokens: int, width: int, device: torch.device) -> Inputs:
    """x bf16 [tokens, width]."""
    generator = torch.Generator(device=device).manual_seed(0)
    return {"x": torch.randn(tokens, width, device=device, generator=generator).to(torch.bfloat16)}


def dequantized(result: tuple[Tensor, Tensor]) -> tuple[Tensor]:
    """x_q * s_x: what a peer that may round a code the other way is compared by."""
    return (result[0].float() * result[1].unsqueeze(-1),)


def _kernel(bits: int, inputs: Inputs) -> Call:
    return lambda: ours.quantize_activations(inputs["x"], bits)


def _eager(inputs: Inputs) -> Call:
    return lambda: reference.quantize_activations(inputs["x"])


def plain(x: Tensor) -> tuple[Tensor, Tensor]:
    """The 8-bit formula as one writes it for torch.compile: x_q and s_x."""
    wide = x.float()
    a = wide.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    return (wide * (127.0 / a)).round().clamp(-128, 127).to(torch.int8), (a / 127.0).squeeze(-1)


def _compiled(inputs: Inputs) -> Call:
    return partial(peers.compiled(plain, inputs["x"]), inputs["x"])


def _expected(bits: int, inputs: Inputs) -> tuple[Tensor, Tensor]:
    return reference.quantize_activations(inputs["x"], bits)


def _dequantized(inputs: Inputs) -> tuple[Tensor]:
    return dequantized(_expected(8, inputs))


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """Inputs of qkv and gate_up (hidden) and of down (ffn)."""
    for model in selection.models_or("0.5b", "3b"):
        for width in (model.hidden, model.ffn):
            for tokens in selection.tokens_or(2048, 16384):
                expected = partial(_expected, 8)
                contenders = (
                    Contender("8 bits", partial(_kernel, 8), expected, ours=True),
                    Contender("4 bits", partial(_kernel, 4), partial(_expected, 4), ours=True),
                    Contender("PyTorch, eager", _eager, expected),
                    Contender("torch.compile", _compiled, _dequantized, 1e-2, view=dequantized),
                )
                sizes = (tokens, 0, width, "", "bfloat16", tokens * (3 * width + 4), 0, "copy")
                case = Case("activation_quantize", f"{model.name} activations", *sizes)
                yield Benchmark(case, partial(tokens_of, tokens, width, selection.device), contenders)


def _share(measured: Measured) -> float | None:
    large = [result for result in measured.of("activation_quantize") if result.case.tokens >= 16384]
    return least_share(large, "8 bits", measured.ceilings)


GOALS = (Goal("from 16k tokens: share of copy bandwidth", 0.8, _share, percent=True),)
