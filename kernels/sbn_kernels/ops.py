"""The operations of a linear layer as PyTorch custom operators `sbn::*`, each with a shape function.

Opaque to torch.compile, which then neither traces into kernel launches nor breaks the graph at them; `dispatch` is
what users call. None is differentiable by itself: gradients are those of the whole layer (straight-through), which
`quantized_linear` registers for one device and megatron_sbn's layers define for many, so that calling one on a tensor
that requires grad and then going backward is an error. A `TernaryWeight` is the last of an operator's arguments, as
its fields.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sbn_kernels.registry import find
from sbn_kernels.ternary_weight import OPERATOR_SCHEMA, TernaryWeight


@torch.library.custom_op("sbn::activation_abs_max", mutates_args=())
def activation_abs_max(x: Tensor, backend: str) -> Tensor:
    """See `reference.activation_abs_max`."""
    abs_max: Tensor = find("activation_abs_max", backend, x.device)(x)
    return abs_max


@activation_abs_max.register_fake
def _(x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("sbn::quantize_activations", mutates_args=())
def quantize_activations(x: Tensor, bits: int, abs_max: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_activations`."""
    x_q, s_x = find("quantize_activations", backend, x.device)(x, bits, abs_max=abs_max)
    return x_q, s_x


@quantize_activations.register_fake
def _(x: Tensor, bits: int, abs_max: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _weight(fields: Sequence[Any], backend: str) -> TernaryWeight:
    """The weight of an operator's `fields`. Raises ValueError for a form that the backend does not have."""
    weight = TernaryWeight.from_operator(fields)
    if weight.form != "dense" and backend != "triton":
        raise ValueError(f"form {weight.form!r} belongs to backend 'triton'; backend {backend!r} has 'dense' alone")
    return weight


@torch.library.custom_op(
    "sbn::int_matmul", mutates_args=(), schema=f"(Tensor x_q, str backend, {OPERATOR_SCHEMA}) -> Tensor"
)
def int_matmul(x_q: Tensor, backend: str, *fields: Any) -> Tensor:  # noqa: ANN401
    """See `reference.int_matmul`."""
    acc: Tensor = find("int_matmul", backend, x_q.device)(x_q, _weight(fields, backend))
    return acc


@int_matmul.register_fake
def _(x_q: Tensor, backend: str, codes: Tensor, *_: Any) -> Tensor:  # noqa: ANN401
    return x_q.new_empty((*x_q.shape[:-1], codes.shape[0]), dtype=torch.float32)


@torch.library.custom_op("sbn::scale_accumulator", mutates_args=())
def scale_accumulator(
    acc: Tensor, s_x: Tensor, gamma_per_row: Tensor, bias: Tensor | None, out_dtype: torch.dtype, backend: str
) -> Tensor:
    """See `reference.scale_accumulator`."""
    y: Tensor = find("scale_accumulator", backend, acc.device)(acc, s_x, gamma_per_row, bias, out_dtype)
    return y


@scale_accumulator.register_fake
def _(
    acc: Tensor, s_x: Tensor, gamma_per_row: Tensor, bias: Tensor | None, out_dtype: torch.dtype, backend: str
) -> Tensor:
    return acc.new_empty(acc.shape, dtype=out_dtype)


@torch.library.custom_op(
    "sbn::ternary_linear",
    mutates_args=(),
    schema=f"(Tensor x_q, Tensor s_x, Tensor? bias, ScalarType out_dtype, str backend, {OPERATOR_SCHEMA}) -> Tensor",
)
def ternary_linear(
    x_q: Tensor,
    s_x: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
    *fields: Any,  # noqa: ANN401
) -> Tensor:
    """See `reference.ternary_linear`."""
    run = find("ternary_linear", backend, x_q.device)
    y: Tensor = run(x_q, s_x, _weight(fields, backend), bias, out_dtype)
    return y


@ternary_linear.register_fake
def _(
    x_q: Tensor,
    s_x: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
    codes: Tensor,
    *_: Any,  # noqa: ANN401
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], codes.shape[0]), dtype=out_dtype)


@torch.library.custom_op(
    "sbn::input_gradient",
    mutates_args=(),
    schema=f"(Tensor dy, str mode, str backend, {OPERATOR_SCHEMA}) -> Tensor",
)
def input_gradient(dy: Tensor, mode: str, backend: str, *fields: Any) -> Tensor:  # noqa: ANN401
    """See `reference.input_gradient`."""
    dx: Tensor = find("input_gradient", backend, dy.device)(dy, TernaryWeight.from_operator(fields), mode)
    return dx


@input_gradient.register_fake
def _(dy: Tensor, mode: str, backend: str, codes: Tensor, *_: Any) -> Tensor:  # noqa: ANN401
    return dy.new_empty((*dy.shape[:-1], codes.shape[1]))


@torch.library.custom_op("sbn::weight_gradient", mutates_args=())
def weight_gradient(dy: Tensor, x_q: Tensor, s_x: Tensor, mode: str, backend: str) -> Tensor:
    """See `reference.weight_gradient`."""
    dw: Tensor = find("weight_gradient", backend, dy.device)(dy, x_q, s_x, mode)
    return dw


@weight_gradient.register_fake
def _(dy: Tensor, x_q: Tensor, s_x: Tensor, mode: str, backend: str) -> Tensor:
    return dy.new_empty((dy.shape[-1], x_q.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("sbn::rms_norm_quantize", mutates_args=())
def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """See `rms_norm_quantize.rms_norm_quantize`."""
    x_q, s_x, rstd, _ = find("rms_norm_quantize", backend, x.device)(x, weight, eps)
    return x_q, s_x, rstd


@rms_norm_quantize.register_fake
def _(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    tokens = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(tokens, dtype=torch.float32),
        x.new_empty(tokens, dtype=torch.float32),
    )


@torch.library.custom_op("sbn::rms_norm_backward", mutates_args=())
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """See `rms_norm_quantize.rms_norm_backward`."""
    dx, dweight = find("rms_norm_backward", backend, x.device)(dy, x, weight, rstd)
    return dx, dweight


@rms_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1:], dtype=torch.float32)


@torch.library.custom_op("sbn::swiglu_abs_max", mutates_args=())
def swiglu_abs_max(gate_up: Tensor, backend: str) -> Tensor:
    """See `swiglu_quantize.swiglu_abs_max`."""
    abs_max: Tensor = find("swiglu_abs_max", backend, gate_up.device)(gate_up)
    return abs_max


@swiglu_abs_max.register_fake
def _(gate_up: Tensor, backend: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("sbn::swiglu_quantize", mutates_args=())
def swiglu_quantize(gate_up: Tensor, abs_max: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """See `swiglu_quantize.swiglu_quantize`."""
    x_q, s_x, _ = find("swiglu_quantize", backend, gate_up.device)(gate_up, abs_max=abs_max)
    return x_q, s_x


@swiglu_quantize.register_fake
def _(gate_up: Tensor, abs_max: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    tokens, width = gate_up.shape[:-1], gate_up.shape[-1] // 2
    x_q = gate_up.new_empty((*tokens, width), dtype=torch.int8)
    return x_q, gate_up.new_empty(tokens, dtype=torch.float32)


@torch.library.custom_op("sbn::swiglu_backward", mutates_args=())
def swiglu_backward(dh: Tensor, gate_up: Tensor, backend: str) -> Tensor:
    """See `swiglu_quantize.swiglu_backward`."""
    gradient: Tensor = find("swiglu_backward", backend, gate_up.device)(dh, gate_up)
    return gradient


@swiglu_backward.register_fake
def _(dh: Tensor, gate_up: Tensor, backend: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape)
