"""RMSNorm with the rounding to int8, and its backward: sbn_kernels' rms_norm_quantize.

Bytes at least for each bf16 value: 2 read and 1 written; backward 4 read (dy and x) and 2 written.
"""

from collections.abc import Iterator
from functools import partial

import peers
import torch
from activation_quantize import dequantized, plain, tokens_of
from goals import Goal
from harness import Benchmark, Call, Case, Contender, Inputs
from sbn_kernels import reference
from sbn_kernels.gpu.quantize import activation_quantize
from sbn_kernels.gpu.quantize import rms_norm_quantize as ours
from shapes import Model, Selection
from torch import Tensor
from torch.nn.functional import rms_norm

DEVICE = "cuda"
GOALS: tuple[Goal, ...] = ()
EPS = 1e-5


def _inputs(tokens: int, width: int, device: torch.device) -> Inputs:
    generator = torch.Generator(device=device).manual_seed(1)
    make = partial(torch.randn, device=device, generator=generator)
    gains = (1.0 + 0.1 * make(width)).to(torch.bfloat16)
    return {**tokens_of(tokens, width, device), "weight": gains, "dy": make(tokens, width).to(torch.bfloat16)}


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight.shape, weight, EPS)


def _exact_norm(inputs: Inputs) -> Tensor:
    x, weight = inputs["x"].double(), inputs["weight"].double()
    return x * (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight


def _expected(inputs: Inputs) -> tuple[Tensor]:
    return dequantized(reference.quantize_activations(_exact_norm(inputs).to(torch.bfloat16)))


def _kernel(inputs: Inputs) -> Call:
    return lambda: ours.rms_norm_quantize(inputs["x"], inputs["weight"], EPS)[:2]


def _in_two(inputs: Inputs) -> Call:
    return lambda: activation_quantize.quantize_activations(_norm(inputs["x"], inputs["weight"]))


def _liger_norm(inputs: Inputs) -> torch.nn.Module:
    norm = peers.library("liger_kernel.transformers", "LigerRMSNorm")
    peers.need_cuda(inputs["x"])
    made = norm(inputs["weight"].shape[0], eps=EPS).to(inputs["x"])
    made.weight.data.copy_(inputs["weight"])
    assert isinstance(made, torch.nn.Module)
    return made


def _liger(inputs: Inputs) -> Call:
    norm = _liger_norm(inputs)
    return lambda: activation_quantize.quantize_activations(norm(inputs["x"]).detach())


def _compiled(inputs: Inputs) -> Call:
    function = peers.compiled(lambda x, weight: plain(_norm(x, weight)), inputs["x"])
    return partial(function, inputs["x"], inputs["weight"])


def _backward(inputs: Inputs) -> Call:
    x, weight = inputs["x"], inputs["weight"]
    rstd = ours.rms_norm_quantize(x, weight, EPS)[2]
    return lambda: ours.rms_norm_backward(inputs["dy"], x, weight, rstd)


def _torch_backward(inputs: Inputs) -> Call:
    leaves = (inputs["x"].detach().requires_grad_(), inputs["weight"].detach().requires_grad_())
    y = _norm(*leaves)
    return lambda: torch.autograd.grad(y, leaves, inputs["dy"], retain_graph=True)


def _exact_backward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    x, weight = (inputs[name].double().requires_grad_() for name in ("x", "weight"))
    y = x * (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * weight
    dx, dweight = torch.autograd.grad(y, (x, weight), inputs["dy"].double())
    return dx, dweight


def _case(model: Model, tokens: int, what: str, bytes_a_value: int) -> Case:
    moved = bytes_a_value * tokens * model.hidden
    sizes = (tokens, 0, model.hidden, "", "bfloat16", moved, 0, "copy")
    return Case("rms_norm_quantize", f"{model.name} {what}", *sizes)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """Forward and backward at the hidden sizes."""
    for model in selection.models_or("0.5b", "3b"):
        for tokens in selection.tokens_or(16384):
            inputs = partial(_inputs, tokens, model.hidden, selection.device)
            forward = partial(Contender, expected=_expected, tolerance=1e-2, view=dequantized)
            forwards = (
                forward("fused", _kernel, ours=True),
                forward("rms_norm, our rounding", _in_two),
                forward("Liger, our rounding", _liger),
                forward("torch.compile", _compiled),
            )
            yield Benchmark(_case(model, tokens, "forward", 3), inputs, forwards)
            backwards = (
                Contender("backward", _backward, _exact_backward, 1e-2, ours=True),
                Contender("PyTorch backward", _torch_backward, _exact_backward, 2e-2),
            )
            yield Benchmark(_case(model, tokens, "backward", 6), inputs, backwards)
