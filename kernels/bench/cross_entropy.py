"""Linear + cross-entropy by blocks of tokens, both gradients: sbn_kernels' cross_entropy around PyTorch's GEMMs.

z = h W^T in fp32 for a block of tokens, three numbers a token, then dz in bf16, dh = dz W, dW += dz^T h. Peers make all
logits at once, or fuse as Liger does. Bytes are those of the logits alone, written, read twice and written as dz:
the GEMMs are PyTorch's in every contender but Liger.
"""

from collections.abc import Iterator
from functools import partial

import peers
import torch
from goals import Goal
from harness import Benchmark, Call, Case, Contender, Inputs
from sbn_kernels.gpu import cross_entropy as ours
from shapes import Selection
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

DEVICE = "cuda"
GOALS: tuple[Goal, ...] = ()
BLOCK_BYTES = 192 << 20
_CHECKED_TOKENS = 64


def _inputs(tokens: int, hidden: int, vocabulary: int, device: torch.device) -> Inputs:
    generator = torch.Generator(device=device).manual_seed(0)
    make = partial(torch.randn, device=device, generator=generator)
    return {
        "h": make(tokens, hidden).to(torch.bfloat16),
        "w": (make(vocabulary, hidden) * hidden**-0.5).to(torch.bfloat16),
        "labels": torch.randint(vocabulary, (tokens,), device=device, generator=generator),
    }


def _blocks(inputs: Inputs) -> Call:
    h, w, labels = inputs["h"], inputs["w"], inputs["labels"]
    step = max(1, BLOCK_BYTES // (6 * len(w)))

    def call() -> tuple[Tensor, Tensor, Tensor]:
        losses, dh, dw = torch.empty(len(h), device=h.device), torch.empty_like(h), torch.zeros_like(w)
        for start in range(0, len(h), step):
            block = slice(start, start + step)
            logits = linear(h[block], w).float()
            maximum, exp_sum, target = ours.logit_statistics(logits, labels[block])
            lse = maximum + exp_sum.log()
            losses[block] = lse - target
            dz = ours.logit_gradient(logits, lse, labels[block], h.dtype)
            torch.mm(dz, w, out=dh[block])
            dw.addmm_(dz.t(), h[block])
        return losses, dh, dw

    return call


def _whole(inputs: Inputs) -> Call:
    h, w = (inputs[name].detach().requires_grad_() for name in ("h", "w"))

    def call() -> tuple[Tensor, ...]:
        losses = cross_entropy(linear(h, w).float(), inputs["labels"], reduction="none")
        return (losses.detach(), *torch.autograd.grad(losses.sum(), (h, w)))

    return call


def _liger(inputs: Inputs) -> Call:
    loss = peers.library("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(reduction="sum")
    peers.need_cuda(inputs["h"])
    h, w = (inputs[name].detach().requires_grad_() for name in ("h", "w"))

    def call() -> tuple[Tensor, ...]:
        total = loss(w, h, inputs["labels"])
        return (total.detach(), *torch.autograd.grad(total, (h, w)))

    return call


def _expected(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Losses and dh of the first tokens."""
    few = slice(0, _CHECKED_TOKENS)
    h, w = inputs["h"][few].float().requires_grad_(), inputs["w"].float()
    losses = cross_entropy(h @ w.t(), inputs["labels"][few], reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), h)[0]


def _dh(inputs: Inputs) -> tuple[Tensor]:
    return _expected(inputs)[1:]


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """Qwen2.5's vocabulary at the hidden sizes; as many tokens as all logits fit with, for the peer that makes them."""
    for model in selection.models_or("0.5b", "3b"):
        for tokens in selection.tokens_or(8192):
            size = tokens * selection.vocabulary
            contenders = (
                Contender("blocks of tokens", _blocks, _expected, 2e-2, ours=True, view=lambda result: result[:2]),
                Contender("all logits", _whole, _expected, 2e-2, view=lambda result: result[:2]),
                Contender("Liger", _liger, _dh, 2e-2, view=lambda result: result[1:2]),
            )
            sizes = (tokens, selection.vocabulary, model.hidden, "", "bfloat16", 14 * size, 6 * size * model.hidden)
            case = Case("cross_entropy", f"{model.name} head", *sizes, "bf16")
            inputs = partial(_inputs, tokens, model.hidden, selection.vocabulary, selection.device)
            yield Benchmark(case, inputs, contenders)
