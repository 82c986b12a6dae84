"""What users of the library call. Each function takes `backend`, a name of `registry.BACKENDS`.

The functions here only look the implementation up; `sbn_kernels.reference` documents what each of them computes. Any
backend returns the same integers, and the same floats wherever the reference's are exact; gradients of mode "exact"
differ by rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sbn_kernels import ops
from sbn_kernels.reference import check_sparsity, check_splits, gamma_rows, weight_scales
from sbn_kernels.registry import find, resolve
from sbn_kernels.ternary_weight import TernaryWeight


def nm_mask(w: Tensor, n: int, m: int, *, backend: str = "auto") -> Tensor:
    """Bool mask [out, in] of the n largest |w| of every m along in: see `reference.nm_mask`."""
    mask: Tensor = find("nm_mask", backend, w.device)(w, n, m)
    return mask


def ternary_codes(
    w: Tensor,
    n: int,
    m: int,
    splits: Sequence[int] | None = None,
    *,
    order: str = "quant_then_mask",
    mask_source: str = "latent",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return (codes int8 [out, in] in {-1, 0, 1}, gamma fp32 [len(splits)]) of whole weights.

    Args:
        w: latent weights [out, in], any float dtype, converted to fp32.
        n, m: at most n of every m consecutive codes along in are non-zero; n == m prunes nothing.
        splits: row counts of consecutive parts with a scale each; None is one part.
        order: "quant_then_mask", or "mask_then_quant": gamma is the mean over the survivors.
        mask_source: see `reference.codes_from_gamma`.
        backend: by name.

    Raises:
        ValueError: bad N:M, splits, order or mask_source; NaN or Inf in `w`; "mask_then_quant" with a mask from
            quantized weights, as each would need the other first.
    """
    check_sparsity(n, m, w.shape[-1])
    if order not in ("quant_then_mask", "mask_then_quant"):
        raise ValueError(f"order {order!r} is not one of: quant_then_mask, mask_then_quant")
    mask = None
    if order == "mask_then_quant":
        if mask_source != "latent":
            raise ValueError("order 'mask_then_quant' needs mask_source 'latent': codes need the scale, it the mask")
        mask = nm_mask(w, n, m, backend=backend)
    parts = check_splits(splits, w.shape[0])
    gamma = weight_scales(w, parts, mask)
    rows = gamma_rows(gamma, parts)
    codes, _ = codes_from_gamma(w, rows, n, m, mask_source=mask_source, mask=mask, with_mask=False, backend=backend)
    return codes, gamma


def codes_from_gamma(
    w: Tensor,
    gamma_per_row: Tensor,
    n: int,
    m: int,
    *,
    mask_source: str = "latent",
    mask: Tensor | None = None,
    with_mask: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Codes int8 and mask bool (None without `with_mask`), both [out, in]: see `reference.codes_from_gamma`."""
    run = find("codes_from_gamma", backend, w.device)
    codes, kept = run(w, gamma_per_row, n, m, mask_source=mask_source, mask=mask, with_mask=with_mask)
    return codes, kept


def activation_abs_max(x: Tensor, *, backend: str = "auto") -> Tensor:
    """max|x| of each token, fp32 [...], NaN as +Inf: see `reference.activation_abs_max`."""
    abs_max: Tensor = ops.activation_abs_max(x, resolve(backend, x.device))
    return abs_max


def quantize_activations(
    x: Tensor, bits: int = 8, *, abs_max: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Int8 codes [..., in] and fp32 scales [...]: see `reference.quantize_activations`."""
    x_q, s_x = ops.quantize_activations(x, bits, abs_max, resolve(backend, x.device))
    return x_q, s_x


def int_matmul(x_q: Tensor, weight: TernaryWeight, *, backend: str = "auto") -> Tensor:
    """Exact integers x_q @ codes^T, as fp32 [..., out]: see `reference.int_matmul`."""
    acc: Tensor = ops.int_matmul(x_q, resolve(backend, x_q.device), *weight.operator_fields())
    return acc


def scale_accumulator(
    acc: Tensor,
    s_x: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    backend: str = "auto",
) -> Tensor:
    """((acc * s_x) * gamma) + bias, rounded once: see `reference.scale_accumulator`."""
    y: Tensor = ops.scale_accumulator(acc, s_x, gamma_per_row, bias, out_dtype, resolve(backend, acc.device))
    return y


def ternary_linear(
    x_q: Tensor,
    s_x: Tensor,
    weight: TernaryWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    backend: str = "auto",
) -> Tensor:
    """`int_matmul`, then `scale_accumulator`, as one kernel: see `reference.ternary_linear`."""
    name = resolve(backend, x_q.device)
    y: Tensor = ops.ternary_linear(x_q, s_x, bias, out_dtype, name, *weight.operator_fields())
    return y


def input_gradient(dy: Tensor, weight: TernaryWeight, mode: str = "exact", *, backend: str = "auto") -> Tensor:
    """DX [..., in] in dY's dtype: see `reference.input_gradient`."""
    dx: Tensor = ops.input_gradient(dy, mode, resolve(backend, dy.device), *weight.operator_fields())
    return dx


def weight_gradient(dy: Tensor, x_q: Tensor, s_x: Tensor, mode: str = "exact", *, backend: str = "auto") -> Tensor:
    """DW fp32 [out, in]: see `reference.weight_gradient`."""
    dw: Tensor = ops.weight_gradient(dy, x_q, s_x, mode, resolve(backend, dy.device))
    return dw


def logit_statistics(logits: Tensor, target: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """(maximum, exp_sum, target_logit), fp32 [tokens] each: see `cross_entropy.logit_statistics`."""
    maximum, exp_sum, target_logit = find("logit_statistics", backend, logits.device)(logits, target)
    return maximum, exp_sum, target_logit


def logit_gradient(logits: Tensor, lse: Tensor, target: Tensor, dtype: torch.dtype, *, backend: str = "auto") -> Tensor:
    """Softmax less one at the target, [tokens, vocabulary]; consumes `logits`: see `cross_entropy.logit_gradient`."""
    gradient: Tensor = find("logit_gradient", backend, logits.device)(logits, lse, target, dtype)
    return gradient


def quantize_rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_q, s_x, rstd) of RMSNorm(x) * weight in one kernel: see `rms_norm_quantize.rms_norm_quantize`; CUDA."""
    x_q, s_x, rstd = ops.rms_norm_quantize(x, weight, eps, resolve(backend, x.device))
    return x_q, s_x, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of the norm: see `rms_norm_quantize.rms_norm_backward`; CUDA."""
    dx, dweight = ops.rms_norm_backward(dy, x, weight, rstd, resolve(backend, x.device))
    return dx, dweight


def swiglu_abs_max(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """max|silu(gate) * up| of each token, fp32 [...]: see `swiglu_quantize.swiglu_abs_max`; CUDA."""
    abs_max: Tensor = ops.swiglu_abs_max(gate_up, resolve(backend, gate_up.device))
    return abs_max


def quantize_swiglu(gate_up: Tensor, *, abs_max: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(x_q, s_x) of silu(gate) * up in one kernel: see `swiglu_quantize.swiglu_quantize`; CUDA."""
    x_q, s_x = ops.swiglu_quantize(gate_up, abs_max, resolve(backend, gate_up.device))
    return x_q, s_x


def swiglu_backward(dh: Tensor, gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """Gradient of gate and up [..., 2 ffn]: see `swiglu_quantize.swiglu_backward`; CUDA."""
    gradient: Tensor = ops.swiglu_backward(dh, gate_up, resolve(backend, gate_up.device))
    return gradient
