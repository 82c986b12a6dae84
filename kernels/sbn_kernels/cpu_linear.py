"""The linear layer on CPU: int8 products where the machine has fast ones, fp32 elsewhere, in blocks that fit the cache.

The exact product X_q @ C^T has three forms, all of them exact, so that the fastest may serve (measured once for a
shape and machine, see `tuning`):

    onednn    oneDNN's u8 x s8 kernel on X_q + 128. Without VNNI it adds pairs of products in int16 and saturates, which
              255 * 1 + 255 * 1 cannot reach: exact because the codes are ternary
    int_mm    `torch._int_mm`: int8 x int8 with VNNI, slow without
    float     an fp32 product of integers below 2^24

Full int8 x int8 products (the weight gradient of mode "int8") have the latter two only.

Backward, mode "exact": the scales are folded into the smaller operand,

    dX = dY @ (gamma * C)        gamma * C is exact in fp32
    dW = dY^T @ (s_x * X_q)      one fp32 rounding

both as fp32 products, the fastest there is for floats of any kind on most CPUs.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from sbn_kernels import reference, tuning
from sbn_kernels.exact_sum import SCALE_FLOOR

_BLOCK_ELEMENTS = 1 << 19
_WORTH_MEASURING = 1 << 22


def _blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of `rows` rows whose blocks of `width` columns have about 2^19 elements."""
    step = max(64, _BLOCK_ELEMENTS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _rows(t: Tensor) -> Tensor:
    """View [..., features] as contiguous [tokens, features]."""
    return (t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)).contiguous()


def quantize_activations(x: Tensor, bits: int = 8, *, abs_max: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (x_q int8 [..., in], s_x fp32 [...]): see `reference.quantize_activations`."""
    if bits != 8 or x.dim() == 0 or x.shape[-1] == 0:
        return reference.quantize_activations(x, bits, abs_max=abs_max)
    if abs_max is not None and abs_max.shape != x.shape[:-1]:
        raise ValueError(f"abs_max has shape {tuple(abs_max.shape)}, expected {tuple(x.shape[:-1])}: one per token")
    flat = _rows(x)
    given = None if abs_max is None else abs_max.reshape(-1)
    x_q = torch.empty(flat.shape, dtype=torch.int8)
    s_x = torch.empty(len(flat))
    scaled = _block_buffer(flat)
    for rows in _blocks(*flat.shape):
        block = flat[rows].float()
        a = (row_abs_max(block) if given is None else given[rows]).clamp(min=SCALE_FLOOR)
        rounded = _scale_block(scaled[: len(block)], block, a, s_x[rows]).round_()
        # Its own maximum never takes a token past 127, another's might.
        x_q[rows] = rounded if given is None else rounded.clamp_(-128.0, 127.0)
    return x_q.view(x.shape), s_x.view(x.shape[:-1])


def row_abs_max(x: Tensor) -> Tensor:
    """max|x| of each row of fp32 [rows, k], NaN as +Inf; [rows]."""
    # Not aminmax, which is not vectorised along a row and ten times slower.
    return torch.maximum(x.amax(dim=1), x.amin(dim=1).neg_()).nan_to_num_(nan=torch.inf, posinf=torch.inf)


def _block_buffer(t: Tensor) -> Tensor:
    """fp32 memory for the largest of `_blocks`, used again by every one of them."""
    first = next(_blocks(*t.shape), slice(0, 0))
    return torch.empty(first.stop, t.shape[1])


def _scale_block(scaled: Tensor, block: Tensor, a: Tensor, scales: Tensor) -> Tensor:
    """Return scaled = block * (127/a), and scales = a/127; rows whose a is not finite give 0 and NaN."""
    r = torch.full((), 127.0) / a
    torch.div(a, torch.full((), 127.0), out=scales)
    bad = ~(r.isfinite() & scales.isfinite())
    torch.mul(block, r.unsqueeze(1), out=scaled)
    if bool(bad.any()):
        scaled[bad] = 0.0
        scales[bad] = torch.nan
    return scaled


def _onednn(codes: Tensor) -> Callable[[Tensor], Tensor]:
    """oneDNN's product with `codes`, reordered once: x_q int8 [tokens, in] -> fp32 [tokens, out]."""
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(codes, None)

    def product(x_q: Tensor) -> Tensor:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            x_q.view(torch.uint8) ^ 128, 1.0, 128, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y

    return product


def _int_mm(codes: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x_q: torch._int_mm(x_q, codes.t()).float()


def _float(codes: Tensor) -> Callable[[Tensor], Tensor]:
    matrix = codes.float().t()
    return lambda x_q: x_q.float() @ matrix


_FORMS: Mapping[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = MappingProxyType(
    {"float": _float, "onednn": _onednn, "int_mm": _int_mm}
)


def product_form(tokens: int, codes: Tensor) -> str:
    """Return the name of the fastest form for [tokens, in] x [out, in], measured once on at most 64 tokens."""
    if tokens * codes.numel() < _WORTH_MEASURING:
        return "float"  # also for empty operands, which oneDNN refuses
    few = min(tokens, 64)
    key = {"tokens": tuning.bucket_tokens(few), "out": codes.shape[0], "in": codes.shape[1]}

    def run(name: str) -> Tensor:
        return _FORMS[name](codes)(torch.ones(few, codes.shape[1], dtype=torch.int8))

    candidates = {name: partial(run, name) for name in _FORMS}  # nothing is made unless it is measured
    return tuning.choose("cpu_product", key | {"threads": torch.get_num_threads()}, candidates, device=codes.device)


def _exact_product(tokens: int, codes: Tensor, form: str | None) -> Callable[[Tensor], Tensor]:
    """Return the product with `codes` int8 [out, in] in the given form, or the fastest for so many tokens."""
    matrix = codes.contiguous()
    return _FORMS[form or product_form(tokens, matrix)](matrix)


def int_matmul(x_q: Tensor, codes: Tensor, *, form: str | None = None) -> Tensor:
    """Return x_q @ codes^T exactly, fp32 [..., out]: see `reference.int_matmul`; `form` forces one of `_FORMS`."""
    reference.check_int8(x_q, codes)
    flat = _rows(x_q)
    with torch.autocast("cpu", enabled=False):
        y = _exact_product(len(flat), codes, form)(flat)
    return y.view(*x_q.shape[:-1], len(codes))


def ternary_linear(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    gamma_per_row: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    form: str | None = None,
) -> Tensor:
    """Return Y [..., out]: see `reference.ternary_linear`; scaled where the product wrote it."""
    reference.check_int8(x_q, codes)
    flat, scales = _rows(x_q), s_x.reshape(-1, 1)
    with torch.autocast("cpu", enabled=False):
        y = _exact_product(len(flat), codes, form)(flat)
    for rows in _blocks(*y.shape):  # all passes over a block while it is in cache
        block = y[rows].mul_(scales[rows]).mul_(gamma_per_row)
        if bias is not None:
            block.add_(bias.float())
    return y.to(out_dtype).view(*x_q.shape[:-1], len(codes))


def input_gradient(
    dy: Tensor, codes: Tensor, gamma_per_row: Tensor, codes_t: Tensor | None = None, mode: str = "exact"
) -> Tensor:
    """Return dX [..., in] in dY's dtype: see `reference.input_gradient`, from which "exact" differs by rounding."""
    flat = _rows(dy)
    with torch.autocast("cpu", enabled=False):
        if mode == "exact":
            dx = torch.empty(len(flat), codes.shape[1], dtype=dy.dtype)
            matrix = codes.float().mul_(gamma_per_row.unsqueeze(1))
            if dy.dtype == torch.float32:
                return torch.mm(flat, matrix, out=dx).view(*dy.shape[:-1], codes.shape[1])
            for rows in _blocks(*flat.shape):
                dx[rows] = flat[rows].float() @ matrix
            return dx.view(*dy.shape[:-1], codes.shape[1])
        g_q, s = torch.empty(flat.shape, dtype=torch.int8), torch.empty(len(flat))
        g = _block_buffer(flat)
        for rows in _blocks(*flat.shape):
            torch.mul(flat[rows], gamma_per_row, out=g[: rows.stop - rows.start])
            block = g[: rows.stop - rows.start]
            a = row_abs_max(block).clamp(min=reference.ROW_FLOOR)
            g_q[rows] = _scale_block(block, block, a, s[rows]).round_()
        turned = codes.t() if codes_t is None else codes_t
        y = _exact_product(len(flat), turned, None)(g_q).mul_(s.unsqueeze(1))
    return y.to(dy.dtype).view(*dy.shape[:-1], codes.shape[1])


def weight_gradient(dy: Tensor, x_q: Tensor, s_x: Tensor, mode: str = "exact") -> Tensor:
    """Return dW fp32 [out, in]: see `reference.weight_gradient`, from which "exact" differs by rounding."""
    if mode == "int8":
        return reference.weight_gradient(dy, x_q, s_x, mode)
    left, right, scales = _rows(dy), _rows(x_q), s_x.reshape(-1, 1)
    dw = torch.zeros(left.shape[1], right.shape[1])
    with torch.autocast("cpu", enabled=False):
        width = right.shape[1] if dy.dtype == torch.float32 else max(left.shape[1], right.shape[1])
        for rows in _blocks(len(left), width // 8):
            dw.addmm_(left[rows].float().t(), right[rows].float().mul_(scales[rows]))
    return dw
