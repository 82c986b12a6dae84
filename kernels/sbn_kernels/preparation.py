"""What is derived from the weights of a whole model once per optimizer step, on any backend.

`weight_sums` and `weight_prepare` do it on CUDA in three launches for all layers; elsewhere the same functions go from
one weight to the next. A part is a logical matrix (q, k, v, gate, up, ...) as views of the rows of a weight: its scale
is its own, while the codes are made of the whole weight at once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sbn_kernels import exact_sum
from sbn_kernels.registry import find, resolve
from sbn_kernels.ternary_weight import TernaryWeight

Parts = Sequence[Sequence[Tensor]]
"""Parts, each as contiguous views of rows."""


def abs_maxima(parts: Parts, *, backend: str = "auto") -> Tensor:
    """Return max|w| of each part, fp32 [parts], NaN as +Inf: `exact_sum.part_abs_max`."""
    if resolve(backend, parts[0][0].device) == "triton":
        from sbn_kernels.gpu.weights import weight_sums

        return weight_sums.abs_maxima(parts)
    return torch.stack([torch.stack([exact_sum.part_abs_max(view) for view in part]).amax() for part in parts])


def fixed_point_sums(parts: Parts, units: Tensor, masks: Parts | None = None, *, backend: str = "auto") -> Tensor:
    """Return the exact sum of each part, int64 [parts]: `exact_sum.fixed_point_sum`.

    Args:
        parts: of finite values.
        units: int64 [parts], of `exact_sum.unit_exponent`.
        masks: bool views like `parts`; where they are False a term counts as 0.
        backend: by name; sums over survivors go from part to part on any.
    """
    if masks is None and resolve(backend, units.device) == "triton":
        from sbn_kernels.gpu.weights import weight_sums

        return weight_sums.fixed_point_sums(parts, units)
    totals = []
    for i, part in enumerate(parts):
        kept = [None] * len(part) if masks is None else masks[i]
        pieces = [exact_sum.fixed_point_sum(view, units[i], mask) for view, mask in zip(part, kept, strict=True)]
        totals.append(torch.stack(pieces).sum())
    return torch.stack(totals)


def quantize_weights(
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    n: int,
    m: int,
    *,
    bounds: Sequence[tuple[int, ...] | None] = (),
    mask_source: str = "latent",
    masks: Sequence[Tensor] | None = None,
    with_mask: bool = False,
    forms: Sequence[str] = (),
    backend: str = "auto",
) -> list[tuple[TernaryWeight, Tensor | None]]:
    """Return the ternary weight, and the mask bool [out, in] if wanted, of each: `reference.codes_from_gamma`.

    Args:
        weights: [out, in] of one float type, finite (their `abs_maxima` say so).
        gammas: fp32 [out] each.
        n, m, mask_source: sparsity, and where masks come from.
        bounds: where the runs of rows with one gamma begin, of each weight; unknown if empty.
        masks: bool [out, in] each, used as they are if given.
        with_mask: whether masks are wanted.
        forms: of the forward GEMM of each weight, on the triton backend; "dense" where none are given. Planes are
            made in the same pass, what others read by `pack_form`.
        backend: by name.
    """
    bounds = bounds or [None] * len(weights)
    if weights and resolve(backend, weights[0].device) == "triton":
        from sbn_kernels.gpu.weights import weight_prepare

        forms = forms or ["dense"] * len(weights)
        many = weight_prepare.codes_of_many(
            weights, gammas, n, m,
            mask_source=mask_source, masks=masks, with_mask=with_mask, transpose=True,
            planes=[form == "planes" for form in forms],
        )  # fmt: skip
        assert many.codes_t is not None
        packed = [
            pack_form(form, codes, n, m) if planes is None else (planes,)
            for form, codes, planes in zip(forms, many.codes, many.planes, strict=True)
        ]
        return [
            (
                TernaryWeight(codes, gammas[i], many.codes_t[i], bounds[i], forms[i], packed[i], m),
                None if many.masks is None else many.masks[i],
            )
            for i, codes in enumerate(many.codes)
        ]
    results = []
    for i, (w, gamma) in enumerate(zip(weights, gammas, strict=True)):
        run = find("codes_from_gamma", backend, w.device)
        mask = None if masks is None else masks[i]
        codes, mask = run(w, gamma, n, m, mask_source=mask_source, mask=mask, with_mask=with_mask)
        results.append((TernaryWeight(codes, gamma, bounds=bounds[i], group=m), mask))
    return results


def served_by(
    backend: str, form: str, mode: str, out_features: int, in_features: int, tokens: int, device: torch.device
) -> str:
    """Return in words which kernels serve a ternary layer: "cpu: forward onednn int8, backward exact fp32"."""
    name = resolve(backend, device)
    if name == "triton":
        forward = f"{form} int8"
    elif name == "cpu":
        from sbn_kernels.cpu import linear

        forward = linear.choose_gemm(tokens, torch.zeros(out_features, in_features, dtype=torch.int8))
    else:
        forward = "float"
    return f"{name}: forward {forward}, backward {mode}"


def choose_form(
    form: str,
    sparsity: tuple[int, int],
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """Return the form of the forward GEMM for a layer on CUDA: the one named, checked, or the fastest for "auto".

    Args:
        form: one of `FORMS`.
        sparsity: (N, M).
        shape: (out, in) of the weight.
        tokens: rows of the GEMM's activations.
        dtype: of its result.
        device: where it runs.

    Raises:
        ValueError: the form cannot serve the layer; the line says why.
    """
    from sbn_kernels.gpu import forward_forms

    if form == "auto":
        return forward_forms.choose_form(*sparsity, *shape, tokens, dtype, device)
    forward_forms.check_form(form, *sparsity, *shape)
    return form


def pack_form(form: str, codes: Tensor, n: int, m: int) -> tuple[Tensor, ...]:
    """Return what `form` reads beside the codes: see `forward_forms.pack_form`."""
    from sbn_kernels.gpu import forward_forms

    return forward_forms.pack_form(form, codes, n, m)
