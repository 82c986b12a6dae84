"""What stands between the stream of activations and the int8 activations of a linear layer.

    Quantizer     x_q, s_x = int8 of x
    RmsNormQuantizer    x_q, s_x = int8 of RMSNorm(x) * gain        before the column-parallel layers
    SwigluQuantizer     x_q, s_x = int8 of silu(gate) * up          before the down projection

The latter two are single kernels on CUDA: the floating result in between, which nothing else reads, is never stored.
Each gives the tokens and what its backward pass needs; that pass gets the gradient of the floating result, straight
through the rounding. A layer that holds a slice of each token passes `reduce_max`, the maximum over its ranks.
"""

from collections.abc import Callable

import sbn_kernels as kernels
import torch
from torch import Tensor

from megatron_sbn.functional.settings import LinearSettings

ReduceMax = Callable[[Tensor], Tensor] | None
Produced = tuple[Tensor, Tensor, tuple[Tensor, ...]]
"""x_q int8 [..., in], s_x fp32 [...], and tensors to save."""


class Quantizer:
    """x as it is."""

    def in_features(self, x: Tensor) -> int:
        """Width of what x becomes."""
        return x.shape[-1]

    def quantize(self, x: Tensor, gain: Tensor | None, settings: LinearSettings, reduce_max: ReduceMax) -> Produced:
        """Int8 tokens of x [..., in]."""
        bits = settings.activation_bits or 8
        abs_max = (
            reduce_max(kernels.activation_abs_max(x, backend=settings.backend)) if reduce_max is not None else None
        )
        x_q, s_x = kernels.quantize_activations(x, bits, abs_max=abs_max, backend=settings.backend)
        return x_q, s_x, ()

    def backward(self, dy: Tensor, saved: tuple[Tensor, ...], backend: str) -> tuple[Tensor, Tensor | None]:
        """(dx, gradient of the gain or None) from the gradient of the floating result."""
        return dy, None


class RmsNormQuantizer(Quantizer):
    """RMSNorm with a gain [in], of whole tokens."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def quantize(self, x: Tensor, gain: Tensor | None, settings: LinearSettings, reduce_max: ReduceMax) -> Produced:
        """Int8 tokens of the norm of x [..., in]."""
        assert gain is not None
        assert reduce_max is None
        x_q, s_x, rstd = kernels.quantize_rms_norm(x, gain, self.eps, backend=settings.backend)
        return x_q, s_x, (x, gain, rstd)

    def backward(self, dy: Tensor, saved: tuple[Tensor, ...], backend: str) -> tuple[Tensor, Tensor | None]:
        """(dx, dgain)."""
        x, gain, rstd = saved
        dx, dgain = kernels.rms_norm_backward(dy, x, gain, rstd, backend=backend)
        return dx, dgain.to(gain.dtype)


class SwigluQuantizer(Quantizer):
    """silu(gate) * up of x [..., 2 in], the halves one after the other."""

    def in_features(self, x: Tensor) -> int:
        """Width of one half."""
        return x.shape[-1] // 2

    def quantize(self, x: Tensor, gain: Tensor | None, settings: LinearSettings, reduce_max: ReduceMax) -> Produced:
        """Int8 tokens of the gated product."""
        backend = settings.backend
        abs_max = reduce_max(kernels.swiglu_abs_max(x, backend=backend)) if reduce_max is not None else None
        x_q, s_x = kernels.quantize_swiglu(x, abs_max=abs_max, backend=backend)
        return x_q, s_x, (x,)

    def backward(self, dy: Tensor, saved: tuple[Tensor, ...], backend: str) -> tuple[Tensor, Tensor | None]:
        """(gradient of both halves, None)."""
        return kernels.swiglu_backward(dy, saved[0], backend=backend), None


def can_fuse(settings: LinearSettings, device: torch.device) -> bool:
    """Whether the fused kernels serve a layer: int8 activations at 8 bits on the triton backend."""
    quantized = settings.quantizes_activations and settings.activation_bits == 8
    return quantized and kernels.resolve(settings.backend, device) == "triton"
