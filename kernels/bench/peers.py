"""What we are compared with: PyTorch's GEMMs, the fake-quantized form of the method, torchao, Liger, torch.compile.

The fake-quantized form (as published for BitNet and Sparse-BitNet) keeps everything in floating tensors. Each
micro-batch quantizes and dequantizes the weights, mask included, and each token, and multiplies the results:

    W' = W + stop_gradient(mask * clip(rint(W / gamma), -1, 1) * gamma - W)
    X' = X + stop_gradient(clip(rint(X * 127/a), -128, 127) * a/127 - X)
    Y  = X' @ W'^T

Libraries that are not installed, or need a GPU that is not there, are `UnavailableError`.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from harness import UnavailableError
from torch import Tensor
from torch.nn.functional import linear

SCALE_FLOOR = 1e-5


def library(name: str, attribute: str) -> Any:  # noqa: ANN401
    """Return a name from a library; `UnavailableError` if it is not installed or has no such name."""
    try:
        module: ModuleType = importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{name} is not installed ({error})") from error
    if attribute not in vars(module):
        raise UnavailableError(f"{name} has no {attribute}")
    return vars(module)[attribute]


def need_cuda(tensor: Tensor) -> None:
    """Raise `UnavailableError` unless a tensor is on a CUDA device."""
    if not tensor.is_cuda:
        raise UnavailableError("no CUDA device")


def compiled(function: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """`torch.compile` of a function, on CUDA: each shape by itself, as nothing is gained from guessing."""
    need_cuda(tensor)
    return torch.compile(function, dynamic=False)


def argsort_mask(w: Tensor, n: int, m: int) -> Tensor:
    """The N:M mask by sorting each group and scattering: bool [out, in]; the lower index first on a tie."""
    groups = w.abs().unflatten(-1, (-1, m))
    order = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(-2)


def argsort_codes(w: Tensor, gamma_per_row: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """(codes int8, mask bool), both [out, in], of fp32 weights by `argsort_mask`: the bits of the reference."""
    mask = argsort_mask(w, n, m)
    reciprocal = torch.ones_like(gamma_per_row) / gamma_per_row
    return ((w * reciprocal.unsqueeze(1)).round().clamp(-1, 1) * mask).to(torch.int8), mask


def fake_quant_weight(w: Tensor, parts: Sequence[int], n: int, m: int) -> Tensor:
    """Dequantized weights [out, in] in the type of w, with the mask if n < m; the gradient goes straight through."""
    with torch.no_grad():
        gamma = torch.cat(
            [
                part.abs().mean().clamp(min=SCALE_FLOOR).expand(rows, 1)
                for part, rows in zip(w.split(list(parts)), parts, strict=True)
            ]
        )
        rounded = (w * (1.0 / gamma)).round().clamp(-1, 1) * gamma
        if n < m:
            rounded = rounded * argsort_mask(w, n, m)
    return w + (rounded - w).detach()


def fake_quant_activations(x: Tensor) -> Tensor:
    """Dequantized activations [..., in] in the type of x; the gradient goes straight through."""
    with torch.no_grad():
        scale = 127.0 / x.abs().amax(dim=-1, keepdim=True).clamp(min=SCALE_FLOOR)
        rounded = (x * scale).round().clamp(-128, 127) / scale
    return x + (rounded - x).detach()


def fake_quant_linear(x: Tensor, w: Tensor, parts: Sequence[int], n: int, m: int) -> Tensor:
    """Y [..., out] by the fake-quantized form."""
    return linear(fake_quant_activations(x), fake_quant_weight(w, parts, n, m))


def training_step(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, dy: Tensor) -> Callable[[], Any]:
    """Return a call that gives (y, dx, dw) of y = function(x, w) by autograd."""
    leaves = (x.detach().requires_grad_(), w.detach().requires_grad_())

    def step() -> tuple[Tensor, Tensor, Tensor]:
        y = function(*leaves)
        dx, dw = torch.autograd.grad(y, leaves, dy)
        return y.detach(), dx, dw

    return step


def torchao_step(x: Tensor, w: Tensor, dy: Tensor) -> Callable[[], Any]:
    """`training_step` of torchao's BitNet linear: int8 forward, ternary without mask, one scale a weight."""
    quantize = library("torchao.quantization", "quantize_")
    recipe = library("torchao.prototype.quantized_training", "bitnet_training")
    need_cuda(x)
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device=w.device, dtype=w.dtype)
    layer.weight = torch.nn.Parameter(w.detach().clone())
    container = torch.nn.Sequential(layer)
    quantize(container, recipe())
    weight, leaf = next(container.parameters()), x.detach().requires_grad_()

    def step() -> tuple[Tensor, Tensor, Tensor]:
        y = container(leaf)
        dx, dw = torch.autograd.grad(y, (leaf, weight), dy)
        return y.detach(), dx, dw

    return step
