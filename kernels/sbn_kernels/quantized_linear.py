"""The whole layer on one device as one differentiable operator, `sbn::quantized_linear`.

    forward    Y  = ((X_q @ C^T) * s_x) * gamma + bias
    backward   dX = dY @ (gamma * C), dW = dY^T @ (s_x * X_q), db = sum of dY over tokens    (straight-through)

Its gradients are registered with the operator: torch.compile sees one node forward and its gradients' nodes backward,
and checkpointing may run it again. For models whose layers are not cut; tensor-parallel layers, whose tokens are
exchanged in the middle, put the other operators together themselves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sbn_kernels import ops
from sbn_kernels.registry import resolve


@torch.library.custom_op("sbn::quantized_linear", mutates_args=())
def _quantized_linear(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    gamma_per_row: Tensor,
    codes_t: Tensor | None,
    bias: Tensor | None,
    bits: int,
    mode: str,
    bounds: Sequence[int] | None,
    packed: Sequence[Tensor],
    form: str,
    group: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Y, X_q, s_x); the last two are what backward needs of X."""
    x_q, s_x = ops.quantize_activations(x, bits, None, backend)
    y = ops.ternary_linear(x_q, s_x, codes, gamma_per_row, bias, x.dtype, list(packed), form, group, backend)
    return y, x_q, s_x


@_quantized_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    _, weight, codes, gamma_per_row, codes_t, bias, _, mode, bounds, packed, _, _, backend = inputs
    _, x_q, s_x = output
    ctx.mark_non_differentiable(x_q, s_x)
    ctx.save_for_backward(x_q, s_x, codes, gamma_per_row, codes_t)
    ctx.told = mode, bounds, backend
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
    ctx.packed = len(packed)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:  # noqa: ANN401
    x_q, s_x, codes, gamma_per_row, codes_t = ctx.saved_tensors
    mode, bounds, backend = ctx.told
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = ops.input_gradient(dy, codes, gamma_per_row, codes_t, mode, bounds, backend)
    if ctx.needs_input_grad[1]:
        dw = ops.weight_gradient(dy, x_q, s_x, mode, backend).to(ctx.weight_dtype)
    if ctx.needs_input_grad[5]:
        db = dy.reshape(-1, dy.shape[-1]).float().sum(dim=0).to(ctx.bias_dtype)
    return dx, dw, None, None, None, db, None, None, None, [None] * ctx.packed, None, None, None


_quantized_linear.register_autograd(_backward, setup_context=_save)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    codes: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    *,
    codes_t: Tensor | None = None,
    bits: int = 8,
    mode: str = "exact",
    bounds: Sequence[int] | None = None,
    packed: Sequence[Tensor] = (),
    form: str = "dense",
    group: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Return Y [..., out] in x's dtype, differentiable in `x`, `weight` and `bias`.

    Args:
        x: [..., in], fp32, bf16 or fp16.
        weight: latent weights [out, in]: receive dW; their values are not read.
        codes: int8 [out, in] of `weight`; gamma_per_row: fp32 [out] (`ternary_codes`, `codes_of_many`).
        bias: [out] or None.
        codes_t: int8 [in, out], the codes transposed, which saves doing it in each backward pass on CUDA.
        bits: of the activations, 8 or 4. mode: "exact", "int8_dgrad" or "int8" (`reference.input_gradient`).
        bounds: see `input_gradient`. packed, form, group: see `ternary_linear`.
        backend: by name.

    Raises:
        ValueError: codes of another shape, or a form or backend that cannot serve them.
    """
    if weight.shape != codes.shape:
        raise ValueError(f"weight is {tuple(weight.shape)}, its codes {tuple(codes.shape)}: they must be of one shape")
    told = (bits, mode, None if bounds is None else list(bounds), list(packed), form, group, resolve(backend, x.device))
    y, _, _ = _quantized_linear(x, weight, codes, gamma_per_row, codes_t, bias, *told)
    return y
