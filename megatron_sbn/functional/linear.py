"""One Sparse-BitNet linear layer with autograd: ternary weights, N:M sparsity, int8 activations.

    forward    Y  = ((X_q @ C^T) * s_x[token]) * gamma[row] + bias      X_q int8, C in {-1, 0, 1}, exact product
    backward   dX = dY @ (gamma * C)                                    identity through the activation quantizer
               dW = dY^T @ (s_x * X_q)                                  dense: identity through quantizer and mask

Pruned weights therefore keep learning and may return ("dual straight-through", arXiv 2603.05168). What is saved for
backward is X_q (1 byte an element) and s_x, which is all that forward used of X.

Layout: weights [out, in], activations [..., in] with dim 0 the one that sequence parallelism cuts; scales in fp32;
fused weights (q, k, v; gate, up) have one gamma per part, given per row. One autograd.Function per arithmetic serves
one device and every tensor-parallel layer: what differs is the `LocalCollectives` that moves tokens and adds sums.

Backward accumulates in fp32 and rounds dX to X's dtype, dW to the weight's. In mode "exact" each scale is folded into
an operand or applied to the sum, whichever suits the backend, with at most one rounding to X's dtype; C and X_q are
exact in bf16. The int8 modes round dY with its scales to int8 instead, and multiply exactly: see
`sbn_kernels.reference`, `input_gradient` and `weight_gradient`, also for their error bounds.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sbn_kernels as kernels
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sbn.functional.collectives import LocalCollectives
from megatron_sbn.functional.input_quantizers import Quantizer
from megatron_sbn.functional.settings import (
    ActivationBits,
    Backward,
    LinearSettings,
    MaskedGradient,
    MaskSource,
    Order,
    WeightFormat,
)
from megatron_sbn.functional.weight_handle import LocalWeight

__all__ = ["LinearSettings", "PreparedWeight", "apply_linear", "prepare_weight", "sparse_bitlinear"]

PLAIN_QUANTIZER = Quantizer()
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PreparedWeight:
    """What forward and backward need of W beside W: computed once per optimizer step, never saved in checkpoints.

    Attributes:
        codes: int8 [out, in], of ternary weights.
        codes_t: int8 [in, out], the same codes, where the backend's backward pass reads them so.
        gamma_per_row: fp32 [out], of ternary weights.
        form, packed: how the forward product reads the codes, and what it reads beside them (`sbn_kernels.pack_form`).
        bounds: where the runs of rows with one gamma begin, and out at the end; None if any row may have its own.
        mask: bool [out, in]; present where `LinearSettings.needs_mask`.
    """

    codes: Tensor | None = None
    gamma_per_row: Tensor | None = None
    mask: Tensor | None = None
    codes_t: Tensor | None = None
    form: str = "dense"
    packed: tuple[Tensor, ...] = ()
    bounds: tuple[int, ...] | None = None


def _product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Return a @ b with fp32 accumulation, rounded once to `out_dtype`.

    A CPU has no bf16 product with an fp32 result, and multiplies fp32 faster anyway: the same values, converted.
    """
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == out_dtype and a.device.type != "cpu":
            return a @ b
        if a.dtype != torch.float32 and a.device.type == "cuda" and out_dtype == torch.float32:
            return torch.mm(_tokens_by_features(a), b, out_dtype=out_dtype).reshape(*a.shape[:-1], b.shape[1])
        return (a.float() @ b.float()).to(out_dtype)


def _tokens_by_features(t: Tensor) -> Tensor:
    """View [..., features] as [tokens, features]."""
    return t.reshape(-1, t.shape[-1])


def _weight_gradient(dw: Tensor, store: LocalWeight, mask: Tensor | None, settings: LinearSettings) -> Tensor | None:
    """Apply the mask to the dense fp32 gradient, add SR-STE's decay, where asked for; hand the result over."""
    if mask is not None and settings.masked_gradient == "masked":
        dw = dw * mask
    if mask is not None and settings.sr_ste_decay > 0.0:
        with store.whole() as weight:
            dw = dw + settings.sr_ste_decay * (~mask * weight.float())
    return store.accumulate(dw.to(store.dtype))


class _QuantizedLinear(torch.autograd.Function):
    """Ternary weights and quantized activations; formulas in the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        _anchor: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        store: LocalWeight,
        prepared: PreparedWeight,
        settings: LinearSettings,
        layout: LocalCollectives,
        producer: Quantizer,
    ) -> Tensor:
        codes, gamma = prepared.codes, prepared.gamma_per_row
        assert codes is not None
        assert gamma is not None
        backend = settings.backend
        x_q, s_x, saved = producer.quantize(x, gain, settings, layout.token_abs_max if layout.splits_input else None)
        mask = prepared.mask if settings.needs_mask else None
        ctx.save_for_backward(x_q, s_x, codes, gamma, prepared.codes_t, mask, *saved)
        ctx.settings, ctx.layout, ctx.bounds, ctx.producer = settings, layout, prepared.bounds, producer
        ctx.store, ctx.bias_dtype = store, bias.dtype if bias is not None else None
        pending = layout.start_gather_input(x_q), layout.start_gather_input(s_x)
        tokens, scales = (wait() for wait in pending)
        told: dict[str, Any] = {"packed": prepared.packed, "form": prepared.form, "group": settings.sparsity[1]}
        if not layout.splits_input:
            return kernels.ternary_linear(tokens, scales, codes, gamma, bias, x.dtype, **told, backend=backend)
        acc = layout.reduce_accumulator(kernels.int_matmul(tokens, codes, **told, backend=backend))  # [..., out]
        return kernels.scale_accumulator(acc, layout.local_tokens(scales), gamma, bias, x.dtype, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x_q, s_x, codes, gamma, codes_t, mask, *saved = ctx.saved_tensors
        settings, layout = ctx.settings, ctx.layout
        mode, backend = settings.backward, settings.backend
        dy = layout.gather_grad_output(grad_output)  # [..., out]
        dx = dw = db = dgain = None
        # Tokens are gathered during the product for dX, and dX is summed during the product for dW.
        pending = (layout.start_gather_input(x_q), layout.start_gather_input(s_x)) if ctx.needs_input_grad[1] else ()
        summed = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            summed = layout.start_reduce_grad_input(
                kernels.input_gradient(dy, codes, gamma, codes_t, mode, bounds=ctx.bounds, backend=backend)
            )
        if pending:
            tokens, scales = (wait() for wait in pending)
            dw = kernels.weight_gradient(dy, tokens, scales, mode, backend=backend)
            dw = _weight_gradient(dw, ctx.store, mask, settings)
        if ctx.needs_input_grad[2]:
            db = _tokens_by_features(dy).float().sum(dim=0).to(ctx.bias_dtype)
        if summed is not None:
            dx, dgain = ctx.producer.backward(summed(), tuple(saved), backend)
        return dx, dw, db, dgain, None, None, None, None, None


class _FloatLinear(torch.autograd.Function):
    """Unquantized activations: Y = X @ Wf^T + bias, dX = dY @ Wf, dW = dY^T @ X.

    Wf is W, mask * W or gamma * C, rounded to X's dtype, and made again in backward rather than kept.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        _anchor: Tensor,
        bias: Tensor | None,
        store: LocalWeight,
        prepared: PreparedWeight,
        settings: LinearSettings,
        layout: LocalCollectives,
    ) -> Tensor:
        # Partial sums and biases are added before the only rounding; otherwise the product may round by itself.
        product_dtype = torch.float32 if layout.splits_input or bias is not None else x.dtype
        with _float_weight(store, prepared, x.dtype) as wf:
            y = layout.reduce_accumulator(_product(layout.gather_input(x), wf.t(), product_dtype))
        ctx.save_for_backward(x, prepared.codes, prepared.gamma_per_row, prepared.mask)
        ctx.settings, ctx.layout, ctx.store = settings, layout, store
        ctx.bias_dtype = bias.dtype if bias is not None else None
        return (y if bias is None else y + bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, codes, gamma, mask = ctx.saved_tensors
        layout = ctx.layout
        dy = layout.gather_grad_output(grad_output)  # [..., out]
        dw = db = None
        tokens = layout.start_gather_input(x) if ctx.needs_input_grad[1] else None
        summed = None
        if ctx.needs_input_grad[0]:
            with _float_weight(ctx.store, PreparedWeight(codes, gamma, mask), dy.dtype) as wf:
                summed = layout.start_reduce_grad_input(_product(dy, wf, dy.dtype))
        if tokens is not None:
            dw = _product(_tokens_by_features(dy).t(), _tokens_by_features(tokens()), torch.float32)
            dw = _weight_gradient(dw, ctx.store, mask, ctx.settings)
        if ctx.needs_input_grad[2]:
            db = _tokens_by_features(dy).float().sum(dim=0).to(ctx.bias_dtype)
        dx = summed() if summed is not None else None
        return dx, dw, db, None, None, None, None


@contextlib.contextmanager
def _float_weight(store: LocalWeight, prepared: PreparedWeight, dtype: torch.dtype) -> Iterator[Tensor]:
    """Wf [out, in] in `dtype` for the length of the block: gamma * C, mask * W or W."""
    if prepared.codes is not None and prepared.gamma_per_row is not None:
        yield (prepared.codes * prepared.gamma_per_row.unsqueeze(-1)).to(dtype)
        return
    with store.whole() as weight:
        yield (weight if prepared.mask is None else weight * prepared.mask).to(dtype)


def prepare_weight(weight: Tensor, splits: Sequence[int] | None, settings: LinearSettings) -> PreparedWeight:
    """Return scales, codes and mask of a whole weight on one device.

    Args:
        weight: [out, in].
        splits: row counts of consecutive parts with a scale each; None is one part.
        settings: says what is needed.

    Raises:
        ValueError: `in` is no multiple of M, `splits` do not add up to out, NaN or Inf in `weight`.
    """
    n, m = settings.sparsity
    w = weight.detach()
    parts = kernels.check_splits(splits, w.shape[0])
    if settings.weight_format == "dense":
        return PreparedWeight(mask=kernels.nm_mask(w, n, m, backend=settings.backend) if n < m else None)
    masked_first = settings.order == "mask_then_quant"
    mask = kernels.nm_mask(w, n, m, backend=settings.backend) if masked_first else None
    gamma = kernels.gamma_rows(kernels.weight_scales(w, parts, mask), parts)
    codes, mask = kernels.codes_from_gamma(
        w,
        gamma,
        n,
        m,
        mask_source=settings.mask_source,
        mask=mask,
        with_mask=settings.needs_mask,
        backend=settings.backend,
    )
    form = "dense" if settings.forward_form == "auto" else settings.forward_form
    packed = kernels.pack_form(form, codes, n, m) if form != "dense" else ()
    return PreparedWeight(codes, gamma, mask, form=form, packed=packed, bounds=(0, *itertools.accumulate(parts)))


def apply_linear(
    x: Tensor,
    weight: Tensor | LocalWeight,
    bias: Tensor | None,
    prepared: PreparedWeight,
    settings: LinearSettings,
    layout: LocalCollectives,
    *,
    producer: Quantizer = PLAIN_QUANTIZER,
    gain: Tensor | None = None,
) -> Tensor:
    """Return Y [..., out] in x's dtype, with the gradients of the module's docstring.

    Args:
        x: [..., in], fp32, bf16 or fp16; the dtype of the products, too.
        weight: [out, in], or the store of one; receives dW, in its dtype (fp32 as a rule).
        bias: [out] or None; under tensor parallelism the rows that this rank returns.
        prepared: of the present value of `weight`.
        settings: the arithmetic.
        layout: where the tokens lie.
        producer, gain: what makes the layer's input of x, and its parameter; of quantized activations.

    Raises:
        ValueError: shapes or dtypes that do not fit, or 4-bit activations of a split input.
    """
    if x.dtype not in COMPUTE_DTYPES:
        raise ValueError(f"x has dtype {x.dtype}: convert it to float32, bfloat16 or float16")
    store = weight if isinstance(weight, LocalWeight) else LocalWeight(weight)
    lacks_codes = settings.weight_format == "ternary" and (prepared.codes is None or prepared.gamma_per_row is None)
    if lacks_codes or (settings.needs_mask and prepared.mask is None):
        raise ValueError("prepared lacks codes, gamma_per_row or mask: make it with the settings it is used with")
    out_features, in_features = store.shape
    if x.dim() < 1 or producer.in_features(x) != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, the weight takes [..., {in_features}]")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, the weight gives [..., {out_features}]")
    if not settings.quantizes_activations:
        if producer is not PLAIN_QUANTIZER:
            raise ValueError("what makes a layer's input is fused with its rounding: activations are not rounded here")
        y: Tensor = _FloatLinear.apply(x, store.anchor, bias, store, prepared, settings, layout)
        return y
    if settings.activation_bits == 4 and layout.splits_input:
        raise ValueError("linear.activation_bits: 4 scales by the mean over all of in, so a row-parallel layer takes 8")
    y = _QuantizedLinear.apply(x, store.anchor, bias, gain, store, prepared, settings, layout, producer)
    return y


def sparse_bitlinear(
    x: Tensor,
    weight: Tensor,
    *,
    sparsity: tuple[int, int] = (6, 8),
    splits: Sequence[int] | None = None,
    weight_format: WeightFormat = "ternary",
    activation_bits: ActivationBits = 8,
    order: Order = "quant_then_mask",
    mask_source: MaskSource = "latent",
    masked_gradient: MaskedGradient = "dense",
    backward: Backward = "exact",
    bias: Tensor | None = None,
    sr_ste_decay: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Return Y [..., out] of one Sparse-BitNet linear layer on one device, weights prepared on the spot.

    Args:
        x: [..., in], fp32, bf16 or fp16.
        weight: latent weights [out, in].
        splits: row counts of the logical matrices fused in `weight`, one gamma each; None is one.
        bias: [out] or None.
        sparsity, weight_format, activation_bits, order, mask_source, masked_gradient, backward, sr_ste_decay, backend:
            see `LinearSettings`.

    Raises:
        ValueError: a bad setting, shapes that do not fit, NaN or Inf in `weight`.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [out, in]")
    settings = LinearSettings(
        weight_format=weight_format,
        sparsity=sparsity,
        activation_bits=activation_bits,
        order=order,
        mask_source=mask_source,
        masked_gradient=masked_gradient,
        sr_ste_decay=sr_ste_decay,
        backward=backward,
        backend=backend,
    )
    return apply_linear(x, weight, bias, prepare_weight(weight, splits, settings), settings, LocalCollectives())
