"""The gradient norm of all of DeepSpeed's optimizers, known before any of them updates, so that a step can be refused.

DeepSpeed measures the norm within a step and skips the update, and drops the gradients, where it says that it is not
finite (-1). So the norm is measured first and put in the place of DeepSpeed's own: for one optimizer as it was, for
several (experts have one) as one norm over all of them, and as -1 where the step is refused.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class GradientNorm:
    """Stands in for the norms of DeepSpeed's ZeRO optimizers.

    Args:
        optimizers: those of ZeRO-1 and -2; or one of ZeRO-3 with `zero3`, which takes the norm over its groups.
    """

    def __init__(self, optimizers: Sequence[Any], zero3: bool) -> None:
        self._groups: list[Tensor] = []
        self._norm = torch.zeros(())
        self._refused = False
        self._own: list[Callable[[], Any]]
        if zero3:
            (zero,) = optimizers
            self._own = [zero._get_norm_groups]
            zero._get_norm_groups = self._of_groups
        else:
            self._own = [optimizer.scaled_global_norm for optimizer in optimizers]
            for optimizer in optimizers:
                optimizer.scaled_global_norm = self._of_all
        self._zero3 = zero3

    def measure(self) -> float:
        """The norm of the gradients as they are, on all ranks together; inf where it is not finite."""
        self._refused = False
        measured = [own() for own in self._own]
        self._groups = [torch.as_tensor(norm) for norm in (measured[0] if self._zero3 else measured)]
        norms = torch.stack(self._groups)
        # The norm of one optimizer stays as it is, to the bit.
        joint = norms.reshape(()) if len(self._groups) == 1 else torch.linalg.vector_norm(norms)
        self._norm = torch.where((norms >= 0).all() & norms.isfinite().all(), joint, joint.new_tensor(torch.inf))
        return float(self._norm)

    def refuse(self) -> None:
        """The next step of the optimizers updates nothing and drops its gradients."""
        self._refused = True

    def _of_all(self, norm_type: int = 2) -> Tensor:
        bad = self._refused or not bool(self._norm.isfinite())
        return self._norm.new_tensor(-1.0) if bad else self._norm

    def _of_groups(self) -> list[Tensor]:
        return [self._norm.new_tensor(-1.0)] if self._refused else self._groups
