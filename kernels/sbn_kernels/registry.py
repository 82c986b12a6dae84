"""Which implementation a call runs: always the one that was named, or an error; never a fallback.

    reference   the specification in plain PyTorch, on any device
    cpu         masks by sorting networks, oneDNN's and PyTorch's int8 GEMMs
    triton      CUDA (or, interpreted, CPU tensors)
    auto        by the tensors' device: cpu on CPU, triton on CUDA

Modules are imported when a call first needs them, so that a CPU run never loads Triton.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch

Backend = Literal["auto", "cpu", "triton", "reference"]
FormName = Literal["auto", "dense", "planes", "wgmma", "cusparselt", "mma_sp", "sliding_cusparselt", "sliding_mma_sp"]
BACKENDS: tuple[str, ...] = get_args(Backend)
"""What settings may name."""

FORMS: tuple[str, ...] = get_args(FormName)
"""Forms of the forward GEMM that settings may name: see `forward_forms`; on CPU "auto" and "dense"."""

_BY_DEVICE = MappingProxyType({"cpu": "cpu", "cuda": "triton"})

_MODULES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "reference": MappingProxyType(
            {
                "nm_mask": "reference",
                "codes_from_gamma": "reference",
                "activation_abs_max": "reference",
                "quantize_activations": "reference",
                "int_matmul": "reference_linear",
                "scale_accumulator": "reference",
                "ternary_linear": "reference_linear",
                "input_gradient": "reference_linear",
                "weight_gradient": "reference",
                "logit_statistics": "cpu.cross_entropy",
                "logit_gradient": "cpu.cross_entropy",
            }
        ),
        "cpu": MappingProxyType(
            {
                "nm_mask": "cpu.weights",
                "codes_from_gamma": "cpu.weights",
                "activation_abs_max": "reference",
                "quantize_activations": "cpu.linear",
                "int_matmul": "cpu.linear",
                "scale_accumulator": "reference",
                "ternary_linear": "cpu.linear",
                "input_gradient": "cpu.linear",
                "weight_gradient": "cpu.linear",
                "logit_statistics": "cpu.cross_entropy",
                "logit_gradient": "cpu.cross_entropy",
            }
        ),
        "triton": MappingProxyType(
            {
                "nm_mask": "gpu.weights.weight_prepare",
                "codes_from_gamma": "gpu.weights.weight_prepare",
                "activation_abs_max": "gpu.quantize.activation_quantize",
                "quantize_activations": "gpu.quantize.activation_quantize",
                "int_matmul": "gpu.linear",
                "scale_accumulator": "gpu.accumulator_scale",
                "ternary_linear": "gpu.linear",
                "input_gradient": "gpu.linear",
                "weight_gradient": "gpu.linear",
                "rms_norm_quantize": "gpu.quantize.rms_norm_quantize",
                "rms_norm_backward": "gpu.quantize.rms_norm_quantize",
                "swiglu_quantize": "gpu.quantize.swiglu_quantize",
                "swiglu_abs_max": "gpu.quantize.swiglu_quantize",
                "swiglu_backward": "gpu.quantize.swiglu_quantize",
                "logit_statistics": "gpu.cross_entropy",
                "logit_gradient": "gpu.cross_entropy",
            }
        ),
    }
)


def resolve(backend: str, device: torch.device) -> str:
    """Return the backend that serves a call: `backend` itself, or what "auto" stands for on `device`.

    Raises:
        ValueError: not one of `BACKENDS`, "cpu" for other tensors, or "auto" on a device that is neither CPU nor CUDA.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of: {', '.join(BACKENDS)}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs CPU tensors, got {device.type}; use backend 'auto'")
    if backend != "auto":
        return backend
    if device.type not in _BY_DEVICE:
        raise ValueError(
            f"backend 'auto' knows CPU and CUDA, not {device.type}; name one of: {', '.join(BACKENDS[1:])}"
        )
    return _BY_DEVICE[device.type]


@lru_cache(maxsize=128)
def _load(operation: str, backend: str) -> Callable[..., Any]:
    module = _MODULES[backend].get(operation)
    if module is None:
        raise ValueError(f"backend {backend!r} has no {operation}: that is one kernel on CUDA alone (triton)")
    implementation: Callable[..., Any] = getattr(importlib.import_module(f"sbn_kernels.{module}"), operation)
    return implementation


def find(operation: str, backend: str, device: torch.device) -> Callable[..., Any]:
    """Return the function that implements `operation`; ValueError for an unknown backend."""
    return _load(operation, resolve(backend, device))
