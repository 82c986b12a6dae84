"""Which implementation a call runs: always the one that was named, or an error; never a fallback.

Each public function takes `backend`, the name of a column of the registry below. The functions here only look the
implementation up; `sbn_kernels.reference` documents what each of them computes, and any other backend has to return
the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sbn_kernels import reference

_REGISTRY: Mapping[str, Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        "reference": MappingProxyType(
            {
                function.__name__: function
                for function in (
                    reference.nm_mask,
                    reference.ternary_codes,
                    reference.codes_from_gamma,
                    reference.quantize_activations,
                    reference.quantize_rows,
                    reference.int_matmul,
                    reference.int8_matmul,
                    reference.scale_accumulator,
                    reference.ternary_linear,
                )
            }
        ),
    }
)


def available_backends(operation: str) -> tuple[str, ...]:
    """Return the names of the backends that implement `operation`, a public function's name."""
    return tuple(name for name, operations in _REGISTRY.items() if operation in operations)


def _find(operation: str, backend: str) -> Callable[..., Any]:
    """Return the implementation, or raise ValueError that names the ones there are."""
    if backend not in available_backends(operation):
        raise ValueError(
            f"backend {backend!r} has no {operation}; available: {', '.join(available_backends(operation))}"
        )
    return _REGISTRY[backend][operation]


def nm_mask(w: Tensor, n: int, m: int, *, backend: str = "reference") -> Tensor:
    """Bool mask [out, in] of the n largest |w| of every m along in: see `reference.nm_mask`."""
    mask: Tensor = _find("nm_mask", backend)(w, n, m)
    return mask


def ternary_codes(
    w: Tensor,
    n: int,
    m: int,
    splits: Sequence[int] | None = None,
    *,
    order: str = "quant_then_mask",
    mask_source: str = "latent",
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and gamma fp32 [len(splits)]: see `reference.ternary_codes`."""
    run = _find("ternary_codes", backend)
    codes, gamma = run(w, n, m, splits, order=order, mask_source=mask_source)
    return codes, gamma


def codes_from_gamma(
    w: Tensor,
    gamma_per_row: Tensor,
    n: int,
    m: int,
    *,
    mask_source: str = "latent",
    mask: Tensor | None = None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor]:
    """Codes int8 and mask bool, both [out, in], for given scales: see `reference.codes_from_gamma`."""
    run = _find("codes_from_gamma", backend)
    codes, mask = run(w, gamma_per_row, n, m, mask_source=mask_source, mask=mask)
    return codes, mask


def quantize_activations(
    x: Tensor, bits: int = 8, *, abs_max: Tensor | None = None, backend: str = "reference"
) -> tuple[Tensor, Tensor]:
    """Int8 codes [..., in] and fp32 scales [...]: see `reference.quantize_activations`."""
    x_q, s_x = _find("quantize_activations", backend)(x, bits, abs_max=abs_max)
    return x_q, s_x


def quantize_rows(t: Tensor, *, backend: str = "reference") -> tuple[Tensor, Tensor]:
    """Int8 codes [..., k] and fp32 scales [...] of gradients: see `reference.quantize_rows`."""
    t_q, s = _find("quantize_rows", backend)(t)
    return t_q, s


def int_matmul(x_q: Tensor, codes: Tensor, *, backend: str = "reference") -> Tensor:
    """Exact integers x_q @ codes^T, as fp32 [..., out]: see `reference.int_matmul`."""
    acc: Tensor = _find("int_matmul", backend)(x_q, codes)
    return acc


def int8_matmul(a: Tensor, b: Tensor, *, backend: str = "reference") -> Tensor:
    """Exact integers a @ b^T of int8 matrices, as int32 [p, q]: see `reference.int8_matmul`."""
    product: Tensor = _find("int8_matmul", backend)(a, b)
    return product


def scale_accumulator(
    acc: Tensor,
    s_x: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    backend: str = "reference",
) -> Tensor:
    """((acc * s_x) * gamma) + bias, rounded once: see `reference.scale_accumulator`."""
    y: Tensor = _find("scale_accumulator", backend)(acc, s_x, gamma_per_row, bias, out_dtype)
    return y


def ternary_linear(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    backend: str = "reference",
) -> Tensor:
    """`int_matmul`, then `scale_accumulator`: see `reference.ternary_linear`."""
    y: Tensor = _find("ternary_linear", backend)(x_q, s_x, codes, gamma_per_row, bias, out_dtype)
    return y
