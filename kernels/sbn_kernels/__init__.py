"""The kernel library of megatron_sbn: what a ternary + N:M linear layer computes. Imports torch and triton only.

`reference` is the specification in plain PyTorch, `exact_sum` the sums that do not depend on order, `packing` codes at
2 bits and masks at 1 bit, `TernaryWeight` the weight that all of it multiplies by, `registry` the backends by name,
`dispatch` the functions that run on any of them.
"""

from sbn_kernels.dispatch import (
    activation_abs_max,
    codes_from_gamma,
    input_gradient,
    int_matmul,
    logit_gradient,
    logit_statistics,
    nm_mask,
    quantize_activations,
    quantize_rms_norm,
    quantize_swiglu,
    rms_norm_backward,
    scale_accumulator,
    swiglu_abs_max,
    swiglu_backward,
    ternary_codes,
    ternary_linear,
    weight_gradient,
)
from sbn_kernels.exact_sum import (
    fixed_point_sum,
    gamma_from_fixed_point,
    part_abs_max,
    unit_exponent,
)
from sbn_kernels.formats.packing import flip_count, pack, pack_mask, unpack, unpack_mask
from sbn_kernels.preparation import (
    abs_maxima,
    choose_form,
    fixed_point_sums,
    pack_form,
    quantize_weights,
    served_by,
)
from sbn_kernels.quantized_linear import quantized_linear
from sbn_kernels.reference import check_sparsity, check_splits, gamma_rows, weight_scales
from sbn_kernels.registry import BACKENDS, FORMS, resolve
from sbn_kernels.ternary_weight import TernaryWeight

__all__ = [
    "BACKENDS",
    "FORMS",
    "TernaryWeight",
    "abs_maxima",
    "activation_abs_max",
    "check_sparsity",
    "check_splits",
    "choose_form",
    "codes_from_gamma",
    "fixed_point_sum",
    "fixed_point_sums",
    "flip_count",
    "gamma_from_fixed_point",
    "gamma_rows",
    "input_gradient",
    "int_matmul",
    "logit_gradient",
    "logit_statistics",
    "nm_mask",
    "pack",
    "pack_form",
    "pack_mask",
    "part_abs_max",
    "quantize_activations",
    "quantize_rms_norm",
    "quantize_swiglu",
    "quantize_weights",
    "quantized_linear",
    "resolve",
    "rms_norm_backward",
    "scale_accumulator",
    "served_by",
    "swiglu_abs_max",
    "swiglu_backward",
    "ternary_codes",
    "ternary_linear",
    "unit_exponent",
    "unpack",
    "unpack_mask",
    "weight_gradient",
    "weight_scales",
]
