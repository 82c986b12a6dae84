"""The method on one device, with autograd: `sparse_bitlinear`, and the two halves that layers call."""

from megatron_sbn.functional.linear import (
    PLAIN_QUANTIZER,
    PreparedWeight,
    apply_linear,
    prepare_weight,
    sparse_bitlinear,
)
from megatron_sbn.functional.settings import LinearSettings

__all__ = ["PLAIN_QUANTIZER", "LinearSettings", "PreparedWeight", "apply_linear", "prepare_weight", "sparse_bitlinear"]
