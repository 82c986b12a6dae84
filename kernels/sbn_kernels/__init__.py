"""The kernel library of megatron_sbn: what a ternary + N:M linear layer computes. Imports torch and triton only.

`reference` is the specification in plain PyTorch, `exact_sum` the sums that do not depend on order, `packing` codes at
2 bits and masks at 1 bit, `dispatch` the choice of a backend by name.
"""

from sbn_kernels.dispatch import (
    available_backends,
    codes_from_gamma,
    int8_matmul,
    int_matmul,
    nm_mask,
    quantize_activations,
    quantize_rows,
    scale_accumulator,
    ternary_codes,
    ternary_linear,
)
from sbn_kernels.exact_sum import (
    fixed_point_sum,
    gamma_from_fixed_point,
    part_abs_max,
    unit_exponent,
)
from sbn_kernels.packing import flip_count, pack, pack_mask, unpack, unpack_mask
from sbn_kernels.reference import activation_abs_max, check_sparsity, check_splits, gamma_rows, weight_scales

__all__ = [
    "activation_abs_max",
    "available_backends",
    "check_sparsity",
    "check_splits",
    "codes_from_gamma",
    "fixed_point_sum",
    "flip_count",
    "gamma_from_fixed_point",
    "gamma_rows",
    "int8_matmul",
    "int_matmul",
    "nm_mask",
    "pack",
    "pack_mask",
    "part_abs_max",
    "quantize_activations",
    "quantize_rows",
    "scale_accumulator",
    "ternary_codes",
    "ternary_linear",
    "unit_exponent",
    "unpack",
    "unpack_mask",
    "weight_scales",
]
