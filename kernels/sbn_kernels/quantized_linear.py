"""The whole layer on one device as one differentiable operator, `sbn::quantized_linear`.

    forward    Y  = ((X_q @ C^T) * s_x) * gamma + bias
    backward   dX = dY @ (gamma * C), dW = dY^T @ (s_x * X_q), db = sum of dY over tokens    (straight-through)

Its gradients are registered with the operator: torch.compile sees one node forward and its gradients' nodes backward,
and checkpointing may run it again. It is for models without tensor parallelism: tensor-parallel layers, whose ranks
exchange activations in the middle, put the other operators together themselves.
"""

from typing import Any

import torch
from torch import Tensor

from sbn_kernels import ops
from sbn_kernels.registry import resolve
from sbn_kernels.ternary_weight import OPERATOR_SCHEMA, TernaryWeight


@torch.library.custom_op(
    "sbn::quantized_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor latent, Tensor? bias, SymInt bits, str mode, str backend, "
    f"{OPERATOR_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def _quantized_linear(
    x: Tensor,
    latent: Tensor,
    bias: Tensor | None,
    bits: int,
    mode: str,
    backend: str,
    *fields: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor, Tensor]:
    """(Y, X_q, s_x); the last two are what backward needs of X."""
    x_q, s_x = ops.quantize_activations(x, bits, None, backend)
    return ops.ternary_linear(x_q, s_x, bias, x.dtype, backend, *fields), x_q, s_x


@_quantized_linear.register_fake
def _(x: Tensor, latent: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    y = x.new_empty((*x.shape[:-1], latent.shape[0]))
    return y, x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ANN401
    _, latent, bias, _, ctx.mode, ctx.backend, *fields = inputs
    _, x_q, s_x = output
    ctx.mark_non_differentiable(x_q, s_x)
    ctx.weight = TernaryWeight.from_operator(fields)
    # The codes are kept for backward with X_q; an operator's Tensor[] has a list of gradients.
    ctx.save_for_backward(x_q, s_x)
    ctx.latent_dtype, ctx.bias_dtype = latent.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:  # noqa: ANN401
    x_q, s_x = ctx.saved_tensors  # int8 [..., in], fp32 [...]
    weight: TernaryWeight = ctx.weight
    dx = dlatent = dbias = None
    if ctx.needs_input_grad[0]:
        dx = ops.input_gradient(dy, ctx.mode, ctx.backend, *weight.operator_fields())
    if ctx.needs_input_grad[1]:
        dlatent = ops.weight_gradient(dy, x_q, s_x, ctx.mode, ctx.backend).to(ctx.latent_dtype)
    if ctx.needs_input_grad[2]:
        dbias = dy.reshape(-1, dy.shape[-1]).float().sum(dim=0).to(ctx.bias_dtype)
    # No gradient of bits, mode and backend, nor of the fields; `packed` is a list, and so is its place here.
    of_fields = (None, None, None, None, None, [None] * len(weight.packed), None)
    return dx, dlatent, dbias, None, None, None, *of_fields


_quantized_linear.register_autograd(_backward, setup_context=_save)


def quantized_linear(
    x: Tensor,
    latent: Tensor,
    weight: TernaryWeight,
    bias: Tensor | None = None,
    *,
    bits: int = 8,
    mode: str = "exact",
    backend: str = "auto",
) -> Tensor:
    """Return Y [..., out] in x's dtype, differentiable in `x`, `latent` and `bias`.

    Args:
        x: [..., in], fp32, bf16 or fp16.
        latent: latent weight [out, in]: receives dW; its values are not read.
        weight: the codes and scales of `latent` (`ternary_codes`, `quantize_weights`).
        bias: [out] or None.
        bits: of the activations, 8 or 4.
        mode: "exact", "int8_dgrad" or "int8" (`reference.input_gradient`).
        backend: by name.

    Raises:
        ValueError: codes of another shape, or a form or backend that cannot serve them.
    """
    if latent.shape != weight.shape:
        raise ValueError(f"the weight is {tuple(latent.shape)}, its codes {weight.shape}: they must be of one shape")
    y, _, _ = _quantized_linear(x, latent, bias, bits, mode, resolve(backend, x.device), *weight.operator_fields())
    return y
