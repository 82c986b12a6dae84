"""The whole Sparse-BitNet linear layer in plain PyTorch: the specification that every kernel is tested against.

For latent weights W [out, in] (rows in consecutive parts with one scale each) and activations X [tokens, in]:

    gamma = max(mean|W_part|, 1e-5)                           one fp32 scalar per part
    mask  = the N largest |w| of each M consecutive weights along in, the lower index on a tie
    C     = mask * clip(rint(W * (1/gamma)), -1, 1)           int8 codes
    X_q   = clip(rint(X * (127/a)), -128, 127)                int8, a = max(max|x|, 1e-5) per token
    acc   = X_q @ C^T                                         exact integers
    Y     = ((acc * a/127) * gamma) + bias                    fp32, rounded once to the output's dtype

Sources: Sparse-BitNet (arXiv 2603.05168) for quantize-then-mask and the dense mean; BitNet b1.58 (arXiv 2402.17764) for
the ternary weights and 8-bit activations; BitNet a4.8 (arXiv 2411.04965) for the 4-bit activations.

The order of operations is part of the contract: results are compared bit for bit between kernels, devices and
parallel layouts. Hence true divisions (`127 / tensor` in PyTorch multiplies by a rounded reciprocal, and a CUDA tensor
over a Python number does too), rounding half to even, and sums that are exact. Every |acc| <= 128 * in, and so is every
partial sum of it; for in <= 131072 they are integers up to 2^24, all exact in fp32, in any order.

NaN and Inf: in weights they are refused. In activations a check would cost a synchronisation per call; instead the
token's codes are 0 and its s_x is NaN, so that its outputs are NaN, and no other token's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sbn_kernels.exact_sum import (
    SCALE_FLOOR,
    fixed_point_sum,
    gamma_from_fixed_point,
    part_abs_max,
    row_abs_mean,
    row_slices,
    unit_exponent,
)

MAX_GROUP = 32
"""Largest M of N:M."""

MAX_REDUCTION = 131072
"""Longest exact integer dot product: 128 * 131072 = 2^24, the end of fp32's consecutive integers."""

_INT8_CHUNK = 1024
ROW_FLOOR = 1e-30
"""Lower bound of a gradient row's magnitude."""


def check_sparsity(n: int, m: int, in_features: int) -> None:
    """Raise ValueError unless 1 <= n <= m <= 32 and, for n < m, groups of m tile `in_features`."""
    if not 1 <= n <= m <= MAX_GROUP:
        raise ValueError(f"sparsity {n}:{m} is not N:M with 1 <= N <= M <= {MAX_GROUP}")
    if n < m and in_features % m:
        raise ValueError(f"in_features {in_features} is not a multiple of M = {m}: use another N:M or pad the layer")


def _finite_weights(w: Tensor) -> None:
    """Raise ValueError if `w` is not a float matrix or holds NaN or Inf."""
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"weights must be a float [out, in] matrix, got {w.dtype} of shape {tuple(w.shape)}")
    finite = torch.ones((), dtype=torch.bool, device=w.device)
    for rows in row_slices(w):
        finite &= w[rows].float().isfinite().all()
    if not bool(finite):
        raise ValueError("weights hold NaN or Inf: neither a mask nor codes can be computed from them")


def keep_largest(magnitudes: Tensor, n: int, m: int) -> Tensor:
    """Return the mask, bool, of finite magnitudes [rows, in] by counting for each weight those that rank before it.

    rank_i = #{j : |w_j| > |w_i|} + #{j < i : |w_j| = |w_i|}; 2 m passes over the data and no [.., m, m] temporary.
    """
    groups = magnitudes.unflatten(-1, (-1, m)).movedim(-1, 0).contiguous()  # [m, rows, in/m]
    rank = torch.zeros(groups.shape, dtype=torch.int8, device=groups.device)
    for j in range(m):
        rank += groups[j] > groups
        rank[j + 1 :] += groups[j] == groups[j + 1 :]
    return (rank < n).movedim(0, -1).flatten(-2)


def nm_mask(w: Tensor, n: int, m: int) -> Tensor:
    """Return the N:M mask, bool [out, in]: the n largest |w| of every m consecutive weights along in.

    On a tie the lower index is kept. With n == m everything is kept, for any `in`.

    Raises:
        ValueError: not 1 <= n <= m <= 32, `in` not a multiple of m (n < m), NaN or Inf, not a float matrix.
    """
    check_sparsity(n, m, w.shape[-1])
    _finite_weights(w)
    mask = torch.ones(w.shape, dtype=torch.bool, device=w.device)
    if n < m:
        for rows in row_slices(w):
            mask[rows] = keep_largest(w[rows].float().abs(), n, m)
    return mask


def check_splits(splits: Sequence[int] | None, rows: int) -> tuple[int, ...]:
    """Return the row counts of the parts (one part if None); ValueError unless positive with sum `rows`."""
    parts = (rows,) if splits is None else tuple(splits)
    if sum(parts) != rows or any(part < 1 for part in parts):
        raise ValueError(f"splits {parts} must be positive row counts that add up to out_features {rows}")
    return parts


def weight_scales(w: Tensor, splits: Sequence[int] | None = None, mask: Tensor | None = None) -> Tensor:
    """Return gamma of each part, fp32 [len(splits)]: the mean |w|, at least 1e-5, exact in any order of summation.

    Args:
        w: [out, in], all of it (a caller with shards uses the functions of `exact_sum`).
        splits: row counts of consecutive parts; None is one part.
        mask: bool [out, in]; if given, the mean is over the survivors only (order "mask_then_quant").

    Raises:
        ValueError: `splits` do not add up to out, or NaN or Inf in `w`.
    """
    sizes = check_splits(splits, w.shape[0])
    parts = w.split(sizes)
    masks = mask.split(sizes) if mask is not None else (None,) * len(parts)
    abs_max = torch.stack([part_abs_max(part) for part in parts])
    counts = torch.stack(
        [
            torch.tensor(part.numel(), device=w.device) if kept is None else kept.sum()
            for part, kept in zip(parts, masks, strict=True)
        ]
    )
    unit = unit_exponent(abs_max, counts)
    totals = [fixed_point_sum(part, unit[i], masks[i]) for i, part in enumerate(parts)]
    return gamma_from_fixed_point(torch.stack(totals), unit, counts)


def gamma_rows(gamma: Tensor, splits: Sequence[int]) -> Tensor:
    """Repeat gamma [len(splits)] for the rows of each part: fp32 [out]."""
    repeats = torch.tensor(splits, device=gamma.device)
    return gamma.repeat_interleave(repeats, output_size=sum(splits))


def codes_from_gamma(
    w: Tensor,
    gamma_per_row: Tensor,
    n: int,
    m: int,
    *,
    mask_source: str = "latent",
    mask: Tensor | None = None,
    with_mask: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return (codes int8 [out, in], mask bool [out, in]) for given scales: what a shard of a layer calls.

    codes = mask * clip(rint(w * (1/gamma)), -1, 1), the reciprocal rounded to fp32 before the product.

    Args:
        w: float [out, in], converted to fp32.
        gamma_per_row: fp32 [out].
        n, m: sparsity.
        mask_source: "latent" takes the mask from |w|; "quantized" from |codes before masking|.
        mask: if given, used as it is (masks that are kept for several steps), and `mask_source` is not consulted.
        with_mask: whether the mask is wanted; None is returned in its place otherwise.

    Raises:
        ValueError: bad N:M, shapes, `mask_source`, or NaN or Inf in `w`.
    """
    check_code_arguments(w, gamma_per_row, n, m, mask_source, mask)
    _finite_weights(w)
    from_codes = mask is None and mask_source == "quantized" and n < m
    if mask is None:
        mask = torch.empty(w.shape, dtype=torch.bool, device=w.device) if from_codes else nm_mask(w, n, m)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    reciprocal = _divide(1.0, gamma_per_row).unsqueeze(-1)  # [out, 1]
    for rows in row_slices(w):
        rounded = (w[rows].float() * reciprocal[rows]).round_().clamp_(-1, 1)
        if from_codes:
            mask[rows] = keep_largest(rounded.abs(), n, m)
        codes[rows] = rounded.mul_(mask[rows]).to(torch.int8)
    return codes, mask if with_mask else None


def check_code_arguments(
    w: Tensor, gamma_per_row: Tensor, n: int, m: int, mask_source: str, mask: Tensor | None
) -> None:
    """Raise ValueError for a bad N:M, `mask_source` or shape among the arguments of `codes_from_gamma`."""
    check_sparsity(n, m, w.shape[-1])
    if mask_source not in ("latent", "quantized"):
        raise ValueError(f"mask_source {mask_source!r} is not one of: latent, quantized")
    if gamma_per_row.shape != w.shape[:1]:
        raise ValueError(f"gamma_per_row has shape {tuple(gamma_per_row.shape)}, expected ({w.shape[0]},)")
    if mask is not None and mask.shape != w.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, the weights have {tuple(w.shape)}")


def _divide(numerator: float, t: Tensor) -> Tensor:
    """Return numerator / t, correctly rounded (see the module's docstring)."""
    return t.new_full((), numerator) / t


def activation_abs_max(x: Tensor) -> Tensor:
    """Return max|x| over the last dimension, fp32 [...], NaN as +Inf: a row-parallel caller all-reduces it (MAX).

    Raises:
        ValueError: the last dimension is empty.
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"activations must be [..., in] with in >= 1, got shape {tuple(x.shape)}")
    return torch.nan_to_num(x.abs().amax(dim=-1).float(), nan=torch.inf, posinf=torch.inf)


def _quantize_rows(x: Tensor, r: Tensor, s: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return (clip(rint(x * r), low, high) int8 [..., in], s fp32 [...]); rows with bad r or s get 0 and NaN."""
    bad = ~(r.isfinite() & s.isfinite())
    scaled = x.float() * r.masked_fill(bad, 0.0).unsqueeze(-1)
    codes = scaled.round_().clamp_(low, high).nan_to_num_(0.0).to(torch.int8)
    return codes, s.masked_fill(bad, torch.nan)


def quantize_activations(x: Tensor, bits: int = 8, *, abs_max: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (x_q int8 [..., in], s_x fp32 [...]) with x ~ x_q * s_x, one scale per token.

    bits = 8: a = max(max|x|, 1e-5), x_q = clip(rint(x * (127/a)), -128, 127), s_x = a/127.
    bits = 4: r = sqrt(7) / max(mean|x|, 1e-5), x_q = clip(rint(x * r), -8, 7), s_x = 1/r; large values saturate.

    A token with NaN or Inf gets codes 0 and s_x NaN.

    Args:
        x: float [..., in], converted to fp32; contiguous or not, also without tokens.
        bits: 8 or 4.
        abs_max: fp32 [...], max|x| over the full input dimension where x holds a slice of it; 8 bits only.

    Raises:
        ValueError: other `bits`, `abs_max` with 4 bits or of a wrong shape, empty last dimension.
    """
    if bits not in (8, 4):
        raise ValueError(f"activation bits must be 8 or 4, got {bits}")
    if bits == 4:
        if abs_max is not None:
            raise ValueError("abs_max goes with 8 bits: 4-bit activations are scaled by their mean, and never split")
        if x.dim() == 0 or x.shape[-1] == 0:
            raise ValueError(f"activations must be [..., in] with in >= 1, got shape {tuple(x.shape)}")
        r = _divide(7**0.5, row_abs_mean(x).clamp(min=SCALE_FLOOR))
        return _quantize_rows(x, r, _divide(1.0, r), -8, 7)
    a = activation_abs_max(x) if abs_max is None else abs_max
    if a.shape != x.shape[:-1]:
        raise ValueError(f"abs_max has shape {tuple(a.shape)}, expected one value per token {tuple(x.shape[:-1])}")
    a = a.clamp(min=SCALE_FLOOR)
    return _quantize_rows(x, _divide(127.0, a), a / a.new_full((), 127.0), -128, 127)


def quantize_rows(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (t_q int8 in [-127, 127] [..., k], s fp32 [...]) with |t - t_q * s| <= s/2 up to rounding: gradients.

    As the 8-bit activations, but with a floor of 1e-30 under max|t|, since gradients are legitimately tiny.
    """
    a = activation_abs_max(t).clamp(min=ROW_FLOOR)
    return _quantize_rows(t, _divide(127.0, a), a / a.new_full((), 127.0), -127, 127)


def int_matmul(x_q: Tensor, codes: Tensor) -> Tensor:
    """Return x_q @ codes^T exactly: fp32 [..., out] that holds integers, so that a caller can add it up over ranks.

    A plain fp32 GEMM: every partial sum is an integer of at most 128 * in <= 2^24. TF32 and bf16 multiplication
    modes cannot harm, as int8 values are exact in either and the accumulation stays in fp32; autocast would round
    the result, and is therefore off inside.

    Args:
        x_q: int8 [..., in].
        codes: int8 [out, in] in {-1, 0, 1}.

    Raises:
        ValueError: not int8, different `in`, or in > 131072 (sums would no longer be exact).
    """
    check_int8(x_q, codes)
    with torch.autocast(x_q.device.type, enabled=False):
        return x_q.float() @ codes.float().t()


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b^T exactly, int32 [p, q], of int8 matrices a [p, k] in [-127, 127] and b [q, k] in [-128, 127].

    In slices of 1024 along k, within which fp32 is exact (1024 * 128 * 127 < 2^24), added up in int32.

    Raises:
        ValueError: not int8, different k, or k > 131072.
    """
    check_int8(a, b)
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    with torch.autocast(a.device.type, enabled=False):
        for left, right in zip(a.split(_INT8_CHUNK, dim=1), b.split(_INT8_CHUNK, dim=1), strict=True):
            total += (left.float() @ right.float().t()).to(torch.int32)
    return total


def check_int8(a: Tensor, b: Tensor) -> None:
    """Raise ValueError unless a [..., k] and b [rows, k] are int8 with one k of at most `MAX_REDUCTION`."""
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise ValueError(f"integer GEMMs take int8 operands, got {a.dtype} and {b.dtype}")
    if b.dim() != 2 or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} do not share their last dimension")
    if b.shape[-1] > MAX_REDUCTION:
        raise ValueError(
            f"dot products of length {b.shape[-1]} are not exact: at most {MAX_REDUCTION}, split the layer"
        )


def scale_accumulator(
    acc: Tensor,
    s_x: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return ((float(acc) * s_x[token]) * gamma[row]) + bias in fp32, rounded once to `out_dtype`.

    No fused multiply-add: a kernel that contracts the last two operations differs in the last bit.

    Args:
        acc: integers [..., out], fp32 or int32; left unchanged.
        s_x: fp32 [...].
        gamma_per_row: fp32 [out].
        bias: [out] of any float dtype, or None.
        out_dtype: of the result.
    """
    y = (acc.float() * s_x.unsqueeze(-1)).mul_(gamma_per_row)
    return (y if bias is None else y.add_(bias.float())).to(out_dtype)


def ternary_linear(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return Y [..., out]: `int_matmul`, then `scale_accumulator`."""
    return scale_accumulator(int_matmul(x_q, codes), s_x, gamma_per_row, bias, out_dtype)


def input_gradient(
    dy: Tensor, codes: Tensor, gamma_per_row: Tensor, codes_t: Tensor | None = None, mode: str = "exact"
) -> Tensor:
    """Return dX [..., in] = (dY * gamma[row]) @ C in dY's dtype: the identity through the activation quantizer.

    "exact": the scales are folded into dY in fp32 and rounded to its dtype, C is exact in it, and the GEMM is
    accumulated in fp32. "int8_dgrad" and "int8": G = dY * gamma is quantized per token to int8 instead and multiplied
    exactly, so that |error of dX| <= sum over rows of |C| * max|G[token]| / 254.

    Args:
        dy: float [..., out].
        codes: int8 [out, in].
        gamma_per_row: fp32 [out].
        codes_t: the same codes, int8 [in, out], for backends that want them; not read here.
        mode: "exact", "int8_dgrad" or "int8".
    """
    g = dy.float() * gamma_per_row
    if mode == "exact":
        return _float_product(g.to(dy.dtype), codes.to(dy.dtype)).to(dy.dtype)
    g_q, s = quantize_rows(g)
    return int_matmul(g_q, codes.t()).mul_(s.unsqueeze(-1)).to(dy.dtype)


def weight_gradient(dy: Tensor, x_q: Tensor, s_x: Tensor, mode: str = "exact") -> Tensor:
    """Return dW fp32 [out, in] = (dY * s_x[token])^T @ X_q: dense, the identity through quantizer and mask.

    "exact" and "int8_dgrad" fold the scales as `input_gradient` does. "int8": H = dY * s_x is quantized per row of out,
    over the tokens, to int8, so that |error of dW| <= sum over tokens of |X_q| * max|H[:, row]| / 254.

    Args:
        dy: float [..., out].
        x_q: int8 [..., in].
        s_x: fp32 [...].
        mode: "exact", "int8_dgrad" or "int8".
    """
    h = (dy.float() * s_x.unsqueeze(-1)).flatten(0, -2).t()  # [out, tokens]
    columns = x_q.flatten(0, -2)  # [tokens, in]
    if mode != "int8":
        return _float_product(h.to(dy.dtype), columns.to(dy.dtype))
    if h.shape[1] == 0:
        return h.new_zeros(h.shape[0], columns.shape[1])
    h_q, s = quantize_rows(h)
    return int8_matmul(h_q, columns.t()) * s.unsqueeze(-1)


def _float_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in fp32: the operands' values are exact in it."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()
