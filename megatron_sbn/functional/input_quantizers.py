"""Make the int8 activations of a linear layer, alone or fused with the operation before the layer.

    Quantizer           x_q, s_x = int8 of x
    RmsNormQuantizer    x_q, s_x = int8 of RMSNorm(x) * norm_weight    before the column-parallel layers
    SwigluQuantizer     x_q, s_x = int8 of silu(gate) * up             before the down projection

The latter two are single kernels on CUDA and never store the floating result in between, which nothing else reads. A
quantizer returns the int8 activations and what its backward pass needs. That pass takes the gradient of the floating
result: the gradient goes straight through the quantization. A layer that holds a slice of `in` gives `reduce_max`, the
maximum over its ranks.
"""

from collections.abc import Callable

import sbn_kernels as kernels
import torch
from torch import Tensor

from megatron_sbn.functional.settings import LinearSettings

ReduceMax = Callable[[Tensor], Tensor] | None
Quantized = tuple[Tensor, Tensor, tuple[Tensor, ...]]
"""x_q int8 [..., in], s_x fp32 [...], and the tensors that `backward` needs."""


class Quantizer:
    """Quantizes x as it is."""

    def in_features(self, x: Tensor) -> int:
        """Return the width of the floating result that x becomes."""
        return x.shape[-1]

    def quantize(
        self, x: Tensor, norm_weight: Tensor | None, settings: LinearSettings, reduce_max: ReduceMax
    ) -> Quantized:
        """Return x [..., in] quantized."""
        bits = settings.activation_bits or 8
        abs_max = (
            reduce_max(kernels.activation_abs_max(x, backend=settings.backend)) if reduce_max is not None else None
        )
        x_q, s_x = kernels.quantize_activations(x, bits, abs_max=abs_max, backend=settings.backend)
        return x_q, s_x, ()

    def backward(self, dy: Tensor, saved: tuple[Tensor, ...], backend: str) -> tuple[Tensor, Tensor | None]:
        """Return (dx, gradient of norm_weight or None) from dy [..., in], the gradient of the floating result."""
        return dy, None


class RmsNormQuantizer(Quantizer):
    """Quantizes RMSNorm(x) * norm_weight [in]; this rank must hold all of `in`."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def quantize(
        self, x: Tensor, norm_weight: Tensor | None, settings: LinearSettings, reduce_max: ReduceMax
    ) -> Quantized:
        """Return the norm of x [..., in] quantized."""
        assert norm_weight is not None
        assert reduce_max is None
        x_q, s_x, rstd = kernels.quantize_rms_norm(x, norm_weight, self.eps, backend=settings.backend)
        return x_q, s_x, (x, norm_weight, rstd)

    def backward(self, dy: Tensor, saved: tuple[Tensor, ...], backend: str) -> tuple[Tensor, Tensor | None]:
        """Return (dx, gradient of norm_weight)."""
        x, norm_weight, rstd = saved
        dx, dweight = kernels.rms_norm_backward(dy, x, norm_weight, rstd, backend=backend)
        return dx, dweight.to(norm_weight.dtype)


class SwigluQuantizer(Quantizer):
    """Quantizes silu(gate) * up of x [..., 2 in]: gate is the first half, up the second."""

    def in_features(self, x: Tensor) -> int:
        """Return the width of one half."""
        return x.shape[-1] // 2

    def quantize(
        self, x: Tensor, norm_weight: Tensor | None, settings: LinearSettings, reduce_max: ReduceMax
    ) -> Quantized:
        """Return silu(gate) * up quantized, [..., in]."""
        backend = settings.backend
        abs_max = reduce_max(kernels.swiglu_abs_max(x, backend=backend)) if reduce_max is not None else None
        x_q, s_x = kernels.quantize_swiglu(x, abs_max=abs_max, backend=backend)
        return x_q, s_x, (x,)

    def backward(self, dy: Tensor, saved: tuple[Tensor, ...], backend: str) -> tuple[Tensor, Tensor | None]:
        """Return (gradient of both halves [..., 2 in], None)."""
        return kernels.swiglu_backward(dy, saved[0], backend=backend), None


def can_fuse(settings: LinearSettings, device: torch.device) -> bool:
    """Return whether the fused kernels serve a layer: 8-bit activations on the triton backend."""
    quantized = settings.quantizes_activations and settings.activation_bits == 8
    return quantized and kernels.resolve(settings.backend, device) == "triton"
