"""The linear layer on CPU: int8 GEMMs where the machine has fast ones, fp32 elsewhere, in blocks that fit the cache.

X_q @ C^T is computed by one of three GEMMs, all of them exact, so that the fastest may serve (measured once for a shape
and machine, see `tuning`):

    onednn    oneDNN's u8 x s8 kernel on X_q + 128. Without VNNI it adds pairs of products in int16 and saturates, which
              255 * 1 + 255 * 1 cannot reach: exact because the codes are ternary
    int_mm    `torch._int_mm`: int8 x int8 with VNNI, slow without
    float     an fp32 GEMM of integers below 2^24

Full int8 x int8 GEMMs (the weight gradient of mode "int8") have the latter two only.

Backward, mode "exact": the scales are folded into the smaller operand,

    dX = dY @ (gamma * C)        gamma * C is exact in fp32
    dW = dY^T @ (s_x * X_q)      one fp32 rounding

both as fp32 GEMMs, the fastest there is for floats of any kind on most CPUs.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from sbn_kernels import reference, tuning
from sbn_kernels.exact_sum import SCALE_FLOOR
from sbn_kernels.ternary_weight import TernaryWeight

_BLOCK_ELEMENTS = 1 << 19
_WORTH_MEASURING = 1 << 22
_FEW = 64


def _blocks(rows: int, width: int, elements: int = _BLOCK_ELEMENTS) -> Iterator[slice]:
    """Slices of `rows` rows whose blocks of `width` columns have about so many elements."""
    step = max(64, elements // max(1, width))
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
    x_q, s_x = _quantize_rows(_rows(x), SCALE_FLOOR, given=None if abs_max is None else abs_max.reshape(-1))
    return x_q.view(x.shape), s_x.view(x.shape[:-1])


def _quantize_rows(
    t: Tensor, floor: float, *, factors: Tensor | None = None, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (rint(g * (127/a)) int8 [rows, k], a/127 fp32 [rows]) of g = t * factors; 0 and NaN where a is not finite.

    Args:
        t: float [rows, k].
        floor: a = max(max|g|, floor).
        factors: fp32 [k]; None: ones.
        given: fp32 [rows] in place of max|g|; then results are clipped to [-128, 127].
    """
    top = torch.full((), 127.0)
    codes, a = torch.empty(t.shape, dtype=torch.int8), torch.empty(len(t))
    buffer = torch.empty(next(_blocks(*t.shape), slice(0, 0)).stop, t.shape[1])
    for rows in _blocks(*t.shape):
        scaled = buffer[: rows.stop - rows.start]
        block = t[rows].float() if factors is None else torch.mul(t[rows], factors, out=scaled)
        # Not aminmax, which is not vectorised along a row and ten times slower.
        most = torch.maximum(block.amax(dim=1), block.amin(dim=1).neg_()) if given is None else given[rows]
        a[rows] = most.clamp(min=floor)
        torch.mul(block, (top / a[rows]).unsqueeze(1), out=scaled).round_()
        # Its own maximum never takes a row past 127, another's might.
        codes[rows] = scaled if given is None else scaled.clamp_(-128.0, 127.0)
    s = a / top
    bad = ~((top / a).isfinite() & s.isfinite())
    if bool(bad.any()):
        codes[bad], s[bad] = 0, torch.nan
    return codes, s


def _onednn(codes: Tensor) -> Callable[[Tensor], Tensor]:
    """oneDNN's GEMM with `codes`, reordered once: x_q int8 [tokens, in] -> fp32 [tokens, out]."""
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)

    def gemm(x_q: Tensor) -> Tensor:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            x_q.view(torch.uint8) ^ 128, 1.0, 128, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y

    return gemm


def _int_mm(codes: Tensor) -> Callable[[Tensor], Tensor]:
    """int32 [tokens, out]; as fast by rows of codes as by rows of codes^T."""
    return lambda x_q: torch._int_mm(x_q, codes.t())


def _float(codes: Tensor) -> Callable[[Tensor], Tensor]:
    matrix = codes.float().t()
    return lambda x_q: x_q.float() @ matrix


_GEMMS: Mapping[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = MappingProxyType(
    {"float": _float, "onednn": _onednn, "int_mm": _int_mm}
)


def choose_gemm(tokens: int, codes: Tensor) -> str:
    """Return the name of the fastest GEMM for [tokens, in] x [out, in], measured once on at most 64 tokens.

    Args:
        tokens: rows of the activations.
        codes: int8 [out, in], in memory by rows or by columns.
    """
    if tokens * codes.numel() < _WORTH_MEASURING:
        return "float"  # also for empty operands, which oneDNN refuses
    few = min(tokens, _FEW)
    key = {"tokens": tuning.bucket_tokens(few), "out": codes.shape[0], "in": codes.shape[1]}

    def run(name: str) -> Tensor:
        return _GEMMS[name](codes)(torch.ones(few, codes.shape[1], dtype=torch.int8))

    candidates = {name: partial(run, name) for name in _GEMMS}  # nothing is made unless it is measured
    return tuning.choose("cpu_product", key | {"threads": torch.get_num_threads()}, candidates, device=codes.device)


def _scaled_matmul(
    x_q: Tensor,
    s_x: Tensor,
    codes: Tensor,
    gamma_per_row: Tensor | None = None,
    bias: Tensor | None = None,
    gemm: str | None = None,
) -> Tensor:
    """Return ((x_q @ codes^T) * s_x) * gamma + bias, fp32 [tokens, out]; all passes over a block while it is in cache.

    The GEMM runs once over all tokens: in blocks it would rearrange its operands again for each.
    """
    with torch.autocast("cpu", enabled=False):
        accumulators = _GEMMS[gemm or choose_gemm(len(x_q), codes)](codes)(x_q)
        y = accumulators.view(torch.float32)
        for rows in _blocks(*y.shape):
            block = _to_float(accumulators[rows], y[rows]).mul_(s_x[rows].unsqueeze(1))
            if gamma_per_row is not None:
                block.mul_(gamma_per_row)
            if bias is not None:
                block.add_(bias.float())
    return y


def _to_float(accumulators: Tensor, y: Tensor) -> Tensor:
    """Converts integers where they are: `y` is the fp32 view of the same memory. Fresh memory costs a third more."""
    return y if accumulators.dtype == torch.float32 else y.copy_(accumulators)


def int_matmul(x_q: Tensor, weight: TernaryWeight, *, gemm: str | None = None) -> Tensor:
    """Return x_q @ codes^T exactly, fp32 [..., out]: see `reference.int_matmul`; `gemm` forces one of `_GEMMS`."""
    codes = weight.codes
    reference.check_int8(x_q, codes)
    flat = _rows(x_q)
    with torch.autocast("cpu", enabled=False):
        accumulators = _GEMMS[gemm or choose_gemm(len(flat), codes)](codes)(flat)
    y = _to_float(accumulators, accumulators.view(torch.float32))
    return y.view(*x_q.shape[:-1], len(codes))


def ternary_linear(
    x_q: Tensor,
    s_x: Tensor,
    weight: TernaryWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    gemm: str | None = None,
) -> Tensor:
    """Return Y [..., out]: see `reference.ternary_linear`; `gemm` forces one of `_GEMMS`."""
    codes = weight.codes
    reference.check_int8(x_q, codes)
    y = _scaled_matmul(_rows(x_q), s_x.reshape(-1), codes, weight.gamma_per_row, bias, gemm)
    return y.to(out_dtype).view(*x_q.shape[:-1], len(codes))


def input_gradient(dy: Tensor, weight: TernaryWeight, mode: str = "exact") -> Tensor:
    """Return dX [..., in] in dY's dtype: see `reference.input_gradient`, from which "exact" differs by rounding."""
    codes, gamma = weight.codes, weight.gamma_per_row
    flat, shape = _rows(dy), (*dy.shape[:-1], codes.shape[1])
    if mode != "exact":
        g_q, s = _quantize_rows(flat, reference.ROW_FLOOR, factors=gamma)  # int8 [tokens, out], fp32 [tokens]
        codes_t = codes.t() if weight.codes_t is None else weight.codes_t
        return _scaled_matmul(g_q, s, codes_t).to(dy.dtype).view(shape)
    with torch.autocast("cpu", enabled=False):
        dx = torch.empty(len(flat), codes.shape[1], dtype=dy.dtype)
        matrix = codes.float().mul_(gamma.unsqueeze(1))
        if dy.dtype == torch.float32:
            return torch.mm(flat, matrix, out=dx).view(shape)
        for rows in _blocks(*flat.shape):
            dx[rows] = flat[rows].float() @ matrix
    return dx.view(shape)


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
