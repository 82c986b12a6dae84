"""What a linear layer computes, as one immutable value: its settings, and which of them go together.

A recipe's `linear` section has the same fields and choices (`config.Linear`); neither can import the other, so a test
compares them.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

import sbn_kernels as kernels
from sbn_kernels.registry import Backend, FormName

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
        forward_form: how the forward GEMM reads the codes on CUDA, one of `sbn_kernels.FORMS`; "auto" is measured.
    """

    weight_format: Literal["ternary", "dense"] = "ternary"
    sparsity: tuple[int, int] = (6, 8)
    activation_bits: Literal[8, 4, None] = 8
    order: Literal["quant_then_mask", "mask_then_quant"] = "quant_then_mask"
    mask_source: Literal["latent", "quantized"] = "latent"
    masked_gradient: Literal["dense", "masked"] = "dense"
    sr_ste_decay: float = 0.0
    backward: Backward = "exact"
    backend: Backend = "auto"
    forward_form: FormName = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                allowed = ", ".join(map(str, choices))
                raise ValueError(f"linear.{name}: {getattr(self, name)!r} is not one of: {allowed}")
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
        """Whether X is quantized: with ternary weights, unless activation_bits is None."""
        return self.weight_format == "ternary" and self.activation_bits is not None

    @property
    def needs_mask(self) -> bool:
        """Whether forward or backward uses the mask itself, beside the codes that it shaped."""
        uses = self.weight_format == "dense" or self.masked_gradient == "masked" or self.sr_ste_decay > 0.0
        return uses and self.sparsity[0] < self.sparsity[1]


_CHOICES = {field.name: get_args(field.type) for field in fields(LinearSettings) if get_origin(field.type) is Literal}
