"""What a linear layer computes, as one immutable value: its settings, and which of them go together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import sbn_kernels as kernels

WeightFormat = Literal["ternary", "dense"]
ActivationBits = Literal[8, 4] | None
Order = Literal["quant_then_mask", "mask_then_quant"]
MaskSource = Literal["latent", "quantized"]
MaskedGradient = Literal["dense", "masked"]
Backward = Literal["exact", "int8_dgrad", "int8"]


@dataclass(frozen=True)
class LinearSettings:
    """The arithmetic of a linear layer; an impossible one is a ValueError that names the field.

    Attributes:
        weight_format: "ternary", or "dense": float weights; activations are then never quantized.
        sparsity: (N, M), N of every M consecutive weights along in survive; N = M is no sparsity.
        activation_bits: 8, 4 (column-parallel inputs only) or None; of ternary weights.
        order: "quant_then_mask", or "mask_then_quant": gamma is the mean over survivors; of ternary weights.
        mask_source: "latent" weights, or "quantized" codes (ties everywhere; known to collapse); of ternary weights.
        masked_gradient: "dense" lets pruned weights learn; "masked" is dW * mask.
        sr_ste_decay: adds decay * (1 - mask) * W to dW (SR-STE, arXiv 2102.04010), at every call of backward: who
            accumulates K micro-batches divides it by K.
        backward: "exact", "int8_dgrad" (dX from int8) or "int8" (dW too); of quantized activations.
        backend: the `sbn_kernels` backend, by name; "auto" is cpu on CPU, triton on CUDA.
        forward_form: how the forward product reads the codes on CUDA, one of `sbn_kernels.FORMS`; "auto" is measured.
    """

    weight_format: WeightFormat = "ternary"
    sparsity: tuple[int, int] = (6, 8)
    activation_bits: ActivationBits = 8
    order: Order = "quant_then_mask"
    mask_source: MaskSource = "latent"
    masked_gradient: MaskedGradient = "dense"
    sr_ste_decay: float = 0.0
    backward: Backward = "exact"
    backend: str = "auto"
    forward_form: str = "auto"

    def __post_init__(self) -> None:
        _one_of("weight_format", self.weight_format, ("ternary", "dense"))
        _one_of("activation_bits", self.activation_bits, (8, 4, None))
        _one_of("order", self.order, ("quant_then_mask", "mask_then_quant"))
        _one_of("mask_source", self.mask_source, ("latent", "quantized"))
        _one_of("masked_gradient", self.masked_gradient, ("dense", "masked"))
        _one_of("backward", self.backward, ("exact", "int8_dgrad", "int8"))
        _one_of("backend", self.backend, kernels.BACKENDS)
        _one_of("forward_form", self.forward_form, kernels.FORMS)
        if len(self.sparsity) != 2:
            raise ValueError(f"linear.sparsity: {self.sparsity} is not a pair (N, M); write for example [6, 8]")
        n, m = self.sparsity
        try:
            kernels.check_sparsity(n, m, m)
        except ValueError as error:
            raise ValueError(f"linear.sparsity: {error}") from None
        if not 0.0 <= self.sr_ste_decay < float("inf"):
            raise ValueError(f"linear.sr_ste_decay: {self.sr_ste_decay} must be finite and >= 0; 0 turns it off")
        if self.weight_format == "dense" and (self.order, self.mask_source) != ("quant_then_mask", "latent"):
            raise ValueError(
                f"linear.weight_format: dense weights are not quantized, so order {self.order!r} and mask_source "
                f"{self.mask_source!r} say nothing; leave both at their defaults"
            )
        if (self.order, self.mask_source) == ("mask_then_quant", "quantized"):
            raise ValueError(
                "linear.order: 'mask_then_quant' needs mask_source 'latent', as scale and mask need each other"
            )
        if self.backward != "exact" and not self.quantizes_activations:
            raise ValueError(
                f"linear.backward: {self.backward!r} needs ternary weights and activation_bits; set 'exact'"
            )

    @property
    def quantizes_activations(self) -> bool:
        """Whether X is rounded: with ternary weights, unless activation_bits is None."""
        return self.weight_format == "ternary" and self.activation_bits is not None

    @property
    def needs_mask(self) -> bool:
        """Whether forward or backward uses the mask itself, beside the codes that it shaped."""
        uses = self.weight_format == "dense" or self.masked_gradient == "masked" or self.sr_ste_decay > 0.0
        return uses and self.sparsity[0] < self.sparsity[1]


def _one_of(field: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"linear.{field}: {value!r} is not one of: {', '.join(map(str, allowed))}")
