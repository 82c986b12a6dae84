"""Vocabulary-parallel linear + cross-entropy, by blocks of tokens: the logits of all tokens never exist.

    z = h W^T    loss[t] = log sum_v exp(z[t, v]) - z[t, label[t]]    dz = softmax(z) - onehot(label)
    dh = dz W    dW = dz^T h

Hidden states [tokens, hidden] (a slice of the tokens under sequence parallelism), W [vocabulary/tp, hidden]: a rank
makes its slice of the logits of a block of tokens in fp32, and two small all-reduces per block, a maximum and a sum,
complete the softmax. At a vocabulary of 151,936 the logits of 8,192 tokens take 4.98 GB in fp32; a block takes at most
`BLOCK_BYTES`, whatever the number of tokens. On top comes one copy of W in the type of h, as for any linear layer.

The gradient is made in forward, while a block's logits are there, up to one factor that backward applies: right if the
gradient that comes back is the same for all tokens, as that of a mean or a sum is; backward refuses any other. With
`uniform_gradient=False` backward makes the logits again instead, one more product of three.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sbn_kernels as kernels
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sbn.functional.collectives import LocalCollectives

IGNORED = -100
"""Label of a token whose loss is 0 and which gets no gradient; PyTorch's convention."""

BLOCK_BYTES = 192 * 2**20
"""Bytes of one block's logits (fp32) and their gradient (in h's type)."""

_VOCABULARY_ROWS = 8192


@dataclass(frozen=True)
class _Head:
    """One rank's slice of the vocabulary."""

    matrix: Tensor  # [vocabulary/tp, hidden] in the type of the GEMMs
    group: dist.ProcessGroup | None
    first: int  # id of its first row

    def blocks(self, tokens: int) -> Iterator[slice]:
        row_bytes = self.matrix.shape[0] * (
            4 + (0 if self.matrix.dtype == torch.float32 else self.matrix.element_size())
        )
        step = max(1, BLOCK_BYTES // row_bytes)
        for start in range(0, tokens, step):
            yield slice(start, min(start + step, tokens))

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [block, vocabulary/tp]."""
        return _fp32_gemm(hidden, self.matrix.t())

    def local(self, labels: Tensor) -> Tensor:
        """Row of each label in this slice; -1 if it is not here, or ignored."""
        rows = labels - self.first
        return rows.where((rows >= 0) & (rows < self.matrix.shape[0]) & (labels != IGNORED), -1)

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, lse) of a block, fp32 [block]; 0 and +Inf where the label is ignored."""
        maximum, exp_sum, target_logit = kernels.logit_statistics(logits, self.local(labels))
        if self.group is not None and self.group.size() > 1:
            local_maximum = maximum.clone()
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group=self.group)
            sums = torch.stack([exp_sum * torch.exp(local_maximum - maximum), target_logit])
            dist.all_reduce(sums, group=self.group)
            exp_sum, target_logit = sums.unbind()
        lse = maximum + exp_sum.log()
        kept = labels != IGNORED
        return (lse - target_logit).where(kept, 0.0), lse.where(kept, torch.inf)


def _fp32_gemm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in fp32."""
    with torch.autocast(a.device.type, enabled=False):
        if a.device.type == "cuda" and a.dtype != torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()


def _add_block(head: _Head, hidden: Tensor, dz: Tensor, dh: Tensor, dw: Tensor) -> None:
    """dh = dz W, and dw += dz^T h by slices of the vocabulary, so that no second matrix of dw's size is made."""
    dh.copy_(dz @ head.matrix if dz.device.type == "cuda" else dz.float() @ head.matrix.float())
    for first in range(0, len(dw), _VOCABULARY_ROWS):
        part = slice(first, first + _VOCABULARY_ROWS)
        dw[part] += _fp32_gemm(dz[:, part].t(), hidden)


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses fp32 [tokens] of gathered hidden states; formulas in the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        group: dist.ProcessGroup | None,
        layout: LocalCollectives,
        in_forward: bool,
    ) -> Tensor:
        states = layout.gather_input(hidden).flatten(0, -2)  # [tokens, hidden]
        rank = group.rank() if group is not None else 0
        head = _Head(weight.detach().to(hidden.dtype), group, rank * len(weight))
        losses = torch.empty(len(states), dtype=torch.float32, device=hidden.device)
        lse = torch.empty_like(losses)
        dh = torch.empty_like(states) if in_forward else None
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if in_forward else None
        for block in head.blocks(len(states)):
            logits = head.logits(states[block])
            losses[block], lse[block] = head.losses(logits, labels[block])
            if dh is not None and dw is not None:
                dz = kernels.logit_gradient(logits, lse[block], head.local(labels[block]), hidden.dtype)
                _add_block(head, states[block], dz, dh[block], dw)
                del dz
            del logits  # before the next block's are made
        ctx.save_for_backward(labels, dh, dw, *((hidden, weight, lse) if not in_forward else (None, None, None)))
        ctx.group, ctx.layout, ctx.shape, ctx.weight_dtype = group, layout, hidden.shape, weight.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        labels, dh, dw, hidden, weight, lse = ctx.saved_tensors
        layout: LocalCollectives = ctx.layout
        if dh is not None:
            factor = _common_factor(grad, labels)
            # In fp32: rounded to bf16 first, 1/96 would make the gradients of all layers below 0.2% too large.
            dh, dw = (dh.float() * factor).to(dh.dtype), dw * factor
        else:
            states = layout.gather_input(hidden).flatten(0, -2)
            rank = ctx.group.rank() if ctx.group is not None else 0
            head = _Head(weight.detach().to(hidden.dtype), ctx.group, rank * len(weight))
            dh, dw = torch.empty_like(states), torch.zeros_like(weight, dtype=torch.float32)
            for block in head.blocks(len(states)):
                logits = head.logits(states[block])
                dz = kernels.logit_gradient(logits, lse[block], head.local(labels[block]), torch.float32)
                dz = dz.mul_(grad[block].unsqueeze(1)).to(hidden.dtype)
                _add_block(head, states[block], dz, dh[block], dw)
                del logits, dz
        gathered = (-1, *ctx.shape[1:])
        dx = layout.reduce_grad_input(dh.view(gathered))
        return dx, dw.to(ctx.weight_dtype), None, None, None, None


def _common_factor(grad: Tensor, labels: Tensor) -> Tensor:
    """The value that all kept tokens' gradients have; ValueError (an assertion on CUDA) if there are several."""
    kept = labels != IGNORED
    highest = grad.where(kept, -torch.inf).amax()
    lowest = grad.where(kept, torch.inf).amin()
    one_value = (highest == lowest) | ~kept.any() | grad.isnan().any()
    if grad.device.type == "cuda":
        torch._assert_async(one_value)  # without waiting for the device
    elif not bool(one_value):
        raise ValueError(
            f"gradients of the losses differ over tokens ({float(lowest)} to {float(highest)}): "
            "pass uniform_gradient=False"
        )
    return highest.where(kept.any(), 0.0)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    layout: LocalCollectives | None = None,
    uniform_gradient: bool = True,
) -> Tensor:
    """Return the cross-entropy of every token, fp32 [tokens]; 0 where the label is `IGNORED`.

    Args:
        hidden: [..., hidden], fp32, bf16 or fp16: the type of the GEMMs; dim 0 is what sequence parallelism shards.
        weight: [vocabulary/tp, hidden], rows of this rank's slice of the vocabulary; receives dW accumulated in fp32.
        labels: int64 [tokens], of all tokens in the order of `hidden` flattened; ids of the whole vocabulary.
        group: the tensor-parallel group; None is one device.
        layout: how hidden states lie over the group; None keeps them where they are.
        uniform_gradient: see the module.

    Raises:
        ValueError: shapes that do not fit; in backward, gradients that differ over tokens.
    """
    layout = layout or LocalCollectives()
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, the head takes [..., {weight.shape[1]}]")
    needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    losses: Tensor = _LinearCrossEntropy.apply(
        hidden, weight, labels.flatten(), group, layout, needed and uniform_gradient
    )
    return losses
