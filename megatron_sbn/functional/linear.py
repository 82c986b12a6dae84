"""One Sparse-BitNet linear layer with autograd: ternary weights, N:M sparsity, int8 activations.

    forward    Y  = ((X_q @ C^T) * s_x[token]) * gamma[row] + bias      X_q int8, C in {-1, 0, 1}, exact GEMM
    backward   dX = dY @ (gamma * C)                                    identity through the activation quantizer
               dW = dY^T @ (s_x * X_q)                                  dense: identity through quantizer and mask

Pruned weights therefore keep learning and may return ("dual straight-through", arXiv 2603.05168). What is saved for
backward is X_q (1 byte an element) and s_x, which is all that forward used of X.

Layout: weights [out, in], activations [..., in]; sequence parallelism shards dim 0; scales are fp32; fused weights (q,
k, v; gate, up) have one gamma per part, given per row. One autograd.Function per arithmetic serves one device and every
tensor-parallel layer: what differs is the `LocalCollectives` that gathers activations and adds sums.

Backward accumulates in fp32 and rounds dX to X's dtype, dW to the weight's. In mode "exact" each scale is folded into
an operand or applied to the sum, whichever suits the backend, with at most one rounding to X's dtype; C and X_q are
exact in bf16. The int8 modes quantize dY with its scales to int8 instead, and multiply exactly: see
`sbn_kernels.reference`, `input_gradient` and `weight_gradient`, also for their error bounds.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sbn_kernels as kernels
import torch
from sbn_kernels import TernaryWeight
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sbn.functional.collectives import LocalCollectives
from megatron_sbn.functional.input_quantizers import Quantizer
from megatron_sbn.functional.settings import LinearSettings
from megatron_sbn.functional.weight_handle import LocalWeight

__all__ = ["LinearSettings", "PreparedWeight", "apply_linear", "prepare_weight", "sparse_bitlinear"]

PLAIN_QUANTIZER = Quantizer()
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PreparedWeight:
    """What forward and backward need of W beside W: computed once per optimizer step, never saved in checkpoints.

    Attributes:
        ternary: codes and scales of a ternary weight; None for dense weights.
        mask: bool [out, in]; present where `LinearSettings.needs_mask`.
    """

    ternary: TernaryWeight | None = None
    mask: Tensor | None = None

    @property
    def codes(self) -> Tensor | None:
        """Int8 [out, in], of ternary weights."""
        return None if self.ternary is None else self.ternary.codes

    @property
    def gamma_per_row(self) -> Tensor | None:
        """fp32 [out], of ternary weights."""
        return None if self.ternary is None else self.ternary.gamma_per_row


def _matmul(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Return a @ b with fp32 accumulation, rounded once to `out_dtype`.

    A CPU has no bf16 GEMM with an fp32 result, and multiplies fp32 faster anyway: the same values, converted.
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
    """Give the store dw, fp32 [out, in], masked and with SR-STE's decay where the settings say so."""
    if mask is not None and settings.masked_gradient == "masked":
        dw = dw * mask
    if mask is not None and settings.sr_ste_decay > 0.0:
        with store.gathered() as weight:
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
        norm_weight: Tensor | None,
        store: LocalWeight,
        prepared: PreparedWeight,
        settings: LinearSettings,
        layout: LocalCollectives,
        quantizer: Quantizer,
    ) -> Tensor:
        weight, backend = prepared.ternary, settings.backend
        assert weight is not None
        # X_q int8 [..., in] of this rank's tokens, with one scale per token: what backward needs of X.
        reduce_max = layout.token_abs_max if layout.splits_input else None
        x_q, s_x, saved = quantizer.quantize(x, norm_weight, settings, reduce_max)
        ctx.save_for_backward(x_q, s_x, *saved)
        ctx.prepared, ctx.settings, ctx.layout, ctx.quantizer = prepared, settings, layout, quantizer
        ctx.store, ctx.bias_dtype = store, bias.dtype if bias is not None else None
        # Column-parallel: all tokens [tokens, ..., in], gathered at 1 byte an element.
        waits = layout.start_gather_input(x_q), layout.start_gather_input(s_x)
        x_q, s_x = (wait() for wait in waits)
        if not layout.splits_input:
            return kernels.ternary_linear(x_q, s_x, weight, bias, x.dtype, backend=backend)
        # Row-parallel: integer sums [..., out] are added over ranks before the scales, so that the order does not show.
        acc = layout.reduce_accumulator(kernels.int_matmul(x_q, weight, backend=backend))
        s_x = layout.local_tokens(s_x)
        return kernels.scale_accumulator(acc, s_x, weight.gamma_per_row, bias, x.dtype, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x_q, s_x, *saved = ctx.saved_tensors
        prepared, settings, layout = ctx.prepared, ctx.settings, ctx.layout
        mode, backend = settings.backward, settings.backend
        needs_x, needs_w, needs_bias, needs_norm, *_ = ctx.needs_input_grad
        dx = dw = db = dnorm = None
        dy = layout.gather_grad_output(grad_output)  # [..., out]
        # X_q is gathered during the GEMM for dX, and dX is summed over ranks during the GEMM for dW.
        gathers = (layout.start_gather_input(x_q), layout.start_gather_input(s_x)) if needs_w else ()
        reduction = None
        if needs_x or needs_norm:
            reduction = layout.start_reduce_grad_input(
                kernels.input_gradient(dy, prepared.ternary, mode, backend=backend)  # [..., in]
            )
        if gathers:
            x_q, s_x = (wait() for wait in gathers)
            dw = kernels.weight_gradient(dy, x_q, s_x, mode, backend=backend)  # fp32 [out, in]
            dw = _weight_gradient(dw, ctx.store, prepared.mask if settings.needs_mask else None, settings)
        if needs_bias:
            db = _tokens_by_features(dy).float().sum(dim=0).to(ctx.bias_dtype)
        if reduction is not None:
            dx, dnorm = ctx.quantizer.backward(reduction(), tuple(saved), backend)
        return dx, dw, db, dnorm, None, None, None, None, None


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
        # Partial sums and biases are added before the only rounding; otherwise the GEMM may round by itself.
        matmul_dtype = torch.float32 if layout.splits_input or bias is not None else x.dtype
        with _float_weight(store, prepared, x.dtype) as wf:
            y = layout.reduce_accumulator(_matmul(layout.gather_input(x), wf.t(), matmul_dtype))
        ctx.save_for_backward(x)
        ctx.prepared, ctx.settings, ctx.layout, ctx.store = prepared, settings, layout, store
        ctx.bias_dtype = bias.dtype if bias is not None else None
        return (y if bias is None else y + bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (x,) = ctx.saved_tensors
        prepared, layout = ctx.prepared, ctx.layout
        dw = db = None
        dy = layout.gather_grad_output(grad_output)  # [..., out]
        # As in _QuantizedLinear: the gather runs during the GEMM for dX, the sum during the GEMM for dW.
        gather = layout.start_gather_input(x) if ctx.needs_input_grad[1] else None
        reduction = None
        if ctx.needs_input_grad[0]:
            with _float_weight(ctx.store, prepared, dy.dtype) as wf:
                reduction = layout.start_reduce_grad_input(_matmul(dy, wf, dy.dtype))  # [..., in]
        if gather is not None:
            dw = _matmul(_tokens_by_features(dy).t(), _tokens_by_features(gather()), torch.float32)  # [out, in]
            dw = _weight_gradient(dw, ctx.store, prepared.mask, ctx.settings)
        if ctx.needs_input_grad[2]:
            db = _tokens_by_features(dy).float().sum(dim=0).to(ctx.bias_dtype)
        dx = reduction() if reduction is not None else None
        return dx, dw, db, None, None, None, None


@contextlib.contextmanager
def _float_weight(store: LocalWeight, prepared: PreparedWeight, dtype: torch.dtype) -> Iterator[Tensor]:
    """Wf [out, in] in `dtype` for the length of the block: gamma * C, mask * W or W."""
    if prepared.ternary is not None:
        yield (prepared.ternary.codes * prepared.ternary.gamma_per_row.unsqueeze(-1)).to(dtype)
        return
    with store.gathered() as weight:
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
    bounds = (0, *itertools.accumulate(parts))
    return PreparedWeight(TernaryWeight(codes, gamma, None, bounds, form, packed, group=m), mask)


def apply_linear(
    x: Tensor,
    weight: Tensor | LocalWeight,
    bias: Tensor | None,
    prepared: PreparedWeight,
    settings: LinearSettings,
    layout: LocalCollectives,
    *,
    quantizer: Quantizer = PLAIN_QUANTIZER,
    norm_weight: Tensor | None = None,
) -> Tensor:
    """Return Y [..., out] in x's dtype, with the gradients of the module's docstring.

    Args:
        x: what `quantizer` makes the layer's input [..., in] of; fp32, bf16 or fp16, the dtype of Y and dX, too.
        weight: [out, in], or the store of one; receives dW, in its dtype (fp32 as a rule).
        bias: [out] or None; under tensor parallelism the rows that this rank returns.
        prepared: of the present value of `weight`.
        settings: the arithmetic.
        layout: the collectives between the ranks of the layer.
        quantizer: makes X_q of x; another than `PLAIN_QUANTIZER` needs quantized activations.
        norm_weight: [in], of an `RmsNormQuantizer`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or 4-bit activations of a split input.
    """
    if x.dtype not in COMPUTE_DTYPES:
        raise ValueError(f"x has dtype {x.dtype}: convert it to float32, bfloat16 or float16")
    store = weight if isinstance(weight, LocalWeight) else LocalWeight(weight)
    lacks_codes = settings.weight_format == "ternary" and prepared.ternary is None
    if lacks_codes or (settings.needs_mask and prepared.mask is None):
        raise ValueError("prepared lacks codes or mask: make it with the settings it is used with")
    out_features, in_features = store.shape
    if x.dim() < 1 or quantizer.in_features(x) != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, the weight takes [..., {in_features}]")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, the weight gives [..., {out_features}]")
    if not settings.quantizes_activations:
        if quantizer is not PLAIN_QUANTIZER:
            raise ValueError("a fused quantizer needs quantized activations: set activation_bits or leave it out")
        y: Tensor = _FloatLinear.apply(x, store.anchor, bias, store, prepared, settings, layout)
        return y
    if settings.activation_bits == 4 and layout.splits_input:
        raise ValueError("linear.activation_bits: 4 scales by the mean over all of in, so a row-parallel layer takes 8")
    y = _QuantizedLinear.apply(x, store.anchor, bias, norm_weight, store, prepared, settings, layout, quantizer)
    return y


def sparse_bitlinear(
    x: Tensor,
    weight: Tensor,
    *,
    splits: Sequence[int] | None = None,
    bias: Tensor | None = None,
    **settings: Any,  # noqa: ANN401
) -> Tensor:
    """Return Y [..., out] of one Sparse-BitNet linear layer on one device, weights prepared on the spot.

    Args:
        x: [..., in], fp32, bf16 or fp16.
        weight: latent weights [out, in].
        splits: row counts of the logical matrices fused in `weight`, one gamma each; None is one.
        bias: [out] or None.
        settings: fields of `LinearSettings`, such as sparsity=(2, 4) or backward="int8".

    Raises:
        TypeError: a setting that `LinearSettings` does not have.
        ValueError: a bad setting, shapes that do not fit, NaN or Inf in `weight`.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [out, in]")
    arithmetic = LinearSettings(**settings)
    return apply_linear(x, weight, bias, prepare_weight(weight, splits, arithmetic), arithmetic, LocalCollectives())
