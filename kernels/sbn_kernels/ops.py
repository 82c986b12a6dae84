"""The operations of a linear layer as PyTorch custom operators `sbn::*`, each with a shape function.

Opaque to torch.compile, which then neither traces into kernel launches nor breaks the graph at them; `dispatch` is
what users call. None is differentiable by itself: gradients are those of the whole layer (straight-through), which
its autograd.Function defines, so that calling one on a tensor that requires grad and then going backward is an error.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sbn_kernels.registry import find


@torch.library.custom_op("sbn::quantize_activations", mutates_args=())
def quantize_activations(x: Tensor, bits: int, abs_max: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_activations`."""
    x_q, s_x = find("quantize_activations", backend, x.device)(x, bits, abs_max=abs_max)
    return x_q, s_x


@quantize_activations.register_fake
def _(x: Tensor, bits: int, abs_max: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _formed(backend: str, packed: Sequence[Tensor], form: str, group: int) -> tuple[Any, ...]:
    """What a backend's product is told of the weight's form: forms beside "dense" are Triton's."""
    if backend == "triton":
        return list(packed), form, group
    if form != "dense":
        raise ValueError(f"form {form!r} belongs to backend 'triton'; backend {backend!r} has 'dense' alone")
    return ()


@torch.library.custom_op("sbn::int_matmul", mutates_args=())
def int_matmul(x_q: Tensor, codes: Tensor, packed: Sequence[Tensor], form: str, group: int, backend: str) -> Tensor:
    """See `reference.int_matmul`."""
    formed = _formed(backend, packed, form, group)
    acc: Tensor = find("int_matmul", backend, x_q.device)(x_q, codes, *formed)
    return acc


@int_matmul.register_fake
def _(x_q: Tensor, codes: Tensor, packed: Sequence[Tensor], form: str, group: int, backend: str) -> Tensor:
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


@torch.library.custom_op("sbn::ternary_linear", mutates_args=())
def ternary_linear(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    packed: Sequence[Tensor],
    form: str,
    group: int,
    backend: str,
) -> Tensor:
    """See `reference.ternary_linear`."""
    formed = _formed(backend, packed, form, group)
    run = find("ternary_linear", backend, x_q.device)
    y: Tensor = run(x_q, s_x, codes, gamma_per_row, bias, out_dtype, *formed)
    return y


@ternary_linear.register_fake
def _(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    packed: Sequence[Tensor],
    form: str,
    group: int,
    backend: str,
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], codes.shape[0]), dtype=out_dtype)


@torch.library.custom_op("sbn::input_gradient", mutates_args=())
def input_gradient(
    dy: Tensor,
    codes: Tensor,
    gamma_per_row: Tensor,
    codes_t: Tensor | None,
    mode: str,
    bounds: Sequence[int] | None,
    backend: str,
) -> Tensor:
    """See `reference.input_gradient`."""
    told = (bounds,) if backend == "triton" else ()
    dx: Tensor = find("input_gradient", backend, dy.device)(dy, codes, gamma_per_row, codes_t, mode, *told)
    return dx


@input_gradient.register_fake
def _(
    dy: Tensor,
    codes: Tensor,
    gamma_per_row: Tensor,
    codes_t: Tensor | None,
    mode: str,
    bounds: Sequence[int] | None,
    backend: str,
) -> Tensor:
    return dy.new_empty((*dy.shape[:-1], codes.shape[1]))


@torch.library.custom_op("sbn::weight_gradient", mutates_args=())
def weight_gradient(dy: Tensor, x_q: Tensor, s_x: Tensor, mode: str, backend: str) -> Tensor:
    """See `reference.weight_gradient`."""
    dw: Tensor = find("weight_gradient", backend, dy.device)(dy, x_q, s_x, mode)
    return dw


@weight_gradient.register_fake
def _(dy: Tensor, x_q: Tensor, s_x: Tensor, mode: str, backend: str) -> Tensor:
    return dy.new_empty((dy.shape[-1], x_q.shape[-1]), dtype=torch.float32)
