"""SwiGLU with the rounding to int8, and its backward: sbn_kernels' swiglu_quantize.

Bytes at least for each bf16 value of h: 4 read and 1 written; backward 6 read (dh and both halves) and 4 written.
"""

from collections.abc import Iterator
from functools import partial

import peers
import torch
from activation_quantize import dequantized, plain
from goals import Goal
from harness import Benchmark, Call, Case, Contender, Inputs
from sbn_kernels import reference
from sbn_kernels.gpu.quantize import activation_quantize
from sbn_kernels.gpu.quantize import swiglu_quantize as ours
from shapes import Model, Selection
from torch import Tensor
from torch.nn.functional import silu

DEVICE = "cuda"
GOALS: tuple[Goal, ...] = ()


def _inputs(tokens: int, width: int, device: torch.device) -> Inputs:
    generator = torch.Generator(device=device).manual_seed(0)
    make = partial(torch.randn, device=device, generator=generator)
    return {"gate_up": make(tokens, 2 * width).to(torch.bfloat16), "dh": make(tokens, width).to(torch.bfloat16)}


def _product(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def _expected(inputs: Inputs) -> tuple[Tensor]:
    return dequantized(reference.quantize_activations(_product(inputs["gate_up"])))


def _kernel(inputs: Inputs) -> Call:
    return lambda: ours.swiglu_quantize(inputs["gate_up"])[:2]


def _in_two(inputs: Inputs) -> Call:
    return lambda: activation_quantize.quantize_activations(_product(inputs["gate_up"]))


def _liger(inputs: Inputs) -> Call:
    function = peers.library("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    peers.need_cuda(inputs["gate_up"])
    gate, up = (half.contiguous() for half in inputs["gate_up"].chunk(2, dim=-1))
    return lambda: activation_quantize.quantize_activations(function.apply(gate, up))


def _compiled(inputs: Inputs) -> Call:
    return partial(peers.compiled(lambda gate_up: plain(_product(gate_up)), inputs["gate_up"]), inputs["gate_up"])


def _backward(inputs: Inputs) -> Call:
    return lambda: ours.swiglu_backward(inputs["dh"], inputs["gate_up"])


def _torch_backward(inputs: Inputs) -> Call:
    leaf = inputs["gate_up"].detach().requires_grad_()
    h = _product(leaf)
    return lambda: torch.autograd.grad(h, leaf, inputs["dh"], retain_graph=True)


def _exact_backward(inputs: Inputs) -> tuple[Tensor, ...]:
    leaf = inputs["gate_up"].double().requires_grad_()
    return torch.autograd.grad(_product(leaf), leaf, inputs["dh"].double())


def _case(model: Model, tokens: int, what: str, bytes_a_value: int) -> Case:
    moved = bytes_a_value * tokens * model.ffn
    sizes = (tokens, 0, model.ffn, "", "bfloat16", moved, 0, "copy")
    return Case("swiglu_quantize", f"{model.name} {what}", *sizes)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """Forward and backward at the sizes of the feed-forward."""
    for model in selection.models_or("0.5b", "3b"):
        for tokens in selection.tokens_or(16384):
            inputs = partial(_inputs, tokens, model.ffn, selection.device)
            forward = partial(Contender, expected=_expected, tolerance=1e-2, view=dequantized)
            forwards = (
                forward("fused", _kernel, ours=True),
                forward("PyTorch, our rounding", _in_two),
                forward("Liger, our rounding", _liger),
                forward("torch.compile", _compiled),
            )
            yield Benchmark(_case(model, tokens, "forward", 5), inputs, forwards)
            backwards = (
                Contender("backward", _backward, _exact_backward, 1e-2, ours=True),
                Contender("PyTorch backward", _torch_backward, _exact_backward, 2e-2),
            )
            yield Benchmark(_case(model, tokens, "backward", 10), inputs, backwards)
