"""What cross-entropy needs of a block of logits, in PyTorch: the formulas of `cross_entropy`, on any device."""

import torch
from torch import Tensor

from sbn_kernels.exact_sum import row_slices


def logit_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (maximum, exp_sum, target_logit), fp32 [tokens] each: see `cross_entropy.logit_statistics`."""
    maximum = logits.amax(dim=1)
    exp_sum = torch.empty_like(maximum)
    for rows in row_slices(logits):  # so that no second block of logits is made
        exp_sum[rows] = (logits[rows] - maximum[rows].unsqueeze(1)).exp_().sum(dim=1)
    target_logit = logits.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1)
    return maximum, exp_sum, target_logit.where(target >= 0, 0.0)


def logit_gradient(logits: Tensor, lse: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Return softmax less one at the target, in `dtype`, in place of the logits: see `cross_entropy.logit_gradient`."""
    gradient = logits.sub_(lse.unsqueeze(1)).exp_()
    here = (target >= 0).nonzero().squeeze(1)
    gradient[here, target[here]] -= 1.0
    return gradient.to(dtype)
