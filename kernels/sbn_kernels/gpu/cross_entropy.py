"""What cross-entropy needs of a block of logits, on CUDA: three numbers a token, then the gradient in one pass.

    maximum = max_v z[t, v]     exp_sum = sum_v exp(z[t, v] - maximum)     target_logit = z[t, target[t]]
    gradient[t, v] = (exp(z[t, v] - lse[t]) - [v = target[t]])             0 where lse is +Inf: an ignored token

z fp32 [tokens, vocabulary] may be a slice of the vocabulary: the caller combines maxima and sums over ranks, and target
is -1 where it is another rank's. The first kernel reads z once, with a running maximum and sum (online softmax, Milakov
and Gimelshein 2018, arXiv 1805.02867); the second reads it once more and writes the gradient in the type of the
GEMMs that follow. `cpu/cross_entropy` is the same in PyTorch.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.gpu.primitives.launch import check_device
from sbn_kernels.gpu.primitives.tiles import round_to
from sbn_kernels.inspection import Build

_BLOCK = 4096


@triton.jit
def statistics_kernel(logits, target, maximum, exp_sum, target_logit, vocabulary, BLOCK: tl.constexpr):
    """The three numbers of one token; every lane keeps a maximum and a sum of its own until the end."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * vocabulary
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(row + columns, mask=columns < vocabulary, other=float("-inf"))
        higher = tl.maximum(largest, z)
        # A lane that has seen nothing yet would subtract infinities.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - safe) + tl.exp(z - safe)
        largest = higher
    overall = tl.max(largest, axis=0)
    tl.store(maximum + token, overall)
    tl.store(exp_sum + token, tl.sum(total * tl.exp(largest - overall), axis=0))
    index = tl.load(target + token)
    tl.store(target_logit + token, tl.load(row + index, mask=index >= 0, other=0.0))


@triton.jit
def gradient_kernel(logits, lse, target, gradient, vocabulary, BLOCK: tl.constexpr):
    """Softmax less the target's one, for one block of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocabulary
    z = tl.load(logits + token * vocabulary + columns, mask=inside, other=0.0)
    ones = tl.where(columns == tl.load(target + token), 1.0, 0.0)
    g = tl.exp(z - tl.load(lse + token)) - ones
    tl.store(gradient + token * vocabulary + columns, round_to(g, gradient.dtype.element_ty), mask=inside)


def _check(logits: Tensor, *per_token: Tensor) -> None:
    check_device(logits, *per_token)
    if logits.dim() != 2 or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous fp32 [tokens, vocabulary], got {logits.dtype} {logits.shape}")
    for tensor in per_token:
        if tensor.shape != logits.shape[:1]:
            raise ValueError(f"{tuple(tensor.shape)} values for {logits.shape[0]} tokens: one each is wanted")


def logit_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (maximum, exp_sum, target_logit), fp32 [tokens] each; target_logit is 0 where target is -1.

    Args:
        logits: fp32 [tokens, vocabulary], contiguous.
        target: int64 [tokens], in [-1, vocabulary).

    Raises:
        ValueError: other types or shapes, no CUDA tensors.
    """
    _check(logits, target)
    results = tuple(torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(3))
    if len(logits):
        statistics_kernel[(len(logits),)](logits, target, *results, logits.shape[1], BLOCK=_BLOCK, num_warps=8)
    return results[0], results[1], results[2]


def logit_gradient(logits: Tensor, lse: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the tokens' losses by their logits, [tokens, vocabulary] in `dtype`.

    Args:
        logits: fp32 [tokens, vocabulary], contiguous; its memory may be reused, so it must not be read afterwards.
        lse: fp32 [tokens], log of the sum of exponentials over the whole vocabulary; +Inf for an ignored token, whose
            target is -1: its gradient is 0.
        target: int64 [tokens], in [-1, vocabulary).
        dtype: of the result.

    Raises:
        ValueError: other types or shapes, no CUDA tensors.
    """
    _check(logits, lse, target)
    gradient = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)
    if logits.numel():
        grid = (len(logits), triton.cdiv(logits.shape[1], _BLOCK))
        gradient_kernel[grid](logits, lse, target, gradient, logits.shape[1], BLOCK=_BLOCK, num_warps=8)
    return gradient


_SIGNATURE = {
    **dict.fromkeys(("logits", "maximum", "exp_sum", "target_logit", "lse"), "*fp32"),
    **{"target": "*i64", "gradient": "*bf16", "vocabulary": "i32"},
}
BUILDS: tuple[Build, ...] = (
    Build("cross_entropy[statistics]", statistics_kernel, _SIGNATURE, {"BLOCK": _BLOCK}, 8, aligned=("vocabulary",)),
    Build("cross_entropy[gradient]", gradient_kernel, _SIGNATURE, {"BLOCK": _BLOCK}, 8, aligned=("vocabulary",)),
    Build("cross_entropy[any vocabulary]", statistics_kernel, _SIGNATURE, {"BLOCK": _BLOCK}, 8),
)
