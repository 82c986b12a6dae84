"""SwiGLU and the rounding of its result to int8 in one pass: what precedes the down projection.

    h = silu(gate) * up, silu(g) = g / (1 + exp(-g)), each rounded to the input's type     (Shazeer, arXiv 2002.05202)
    x_q, s_x = int8 of h per token                                                         (activation_quantize)

gate and up are the halves of the fused projection's output [tokens, 2 ffn]. h never exists in memory: 4 bytes read and
1 written per bf16 element of h, in place of 9. Under tensor parallelism a rank has a slice of each token: it asks for
`swiglu_abs_max` first, reduces it over the ranks, and hands it to `swiglu_quantize`, which makes h again; that reads
the halves twice and is still less than storing h. Backward, straight through the rounding, with s = 1 / (1 + exp(-g)):

    dgate = dh * up * (s + g s (1 - s))        dup = dh * silu(g)
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.gpu.primitives.launch import check_device, row_block
from sbn_kernels.gpu.primitives.rounding import finite_abs, quantize_block
from sbn_kernels.gpu.primitives.tiles import round_to
from sbn_kernels.inspection import Build

# A longer token goes by shorter blocks: 16,384 columns leave 16 warps no register to spare (two or four were spilled on
# sm_100 and sm_120), and three blocks of 8,192 are nearer to 18,944 columns than two of 16,384.
_LONGEST_WHOLE, _BLOCK = 16384, 8192


@triton.jit
def _sigmoid(g):
    return tl.div_rn(tl.full(g.shape, 1.0, tl.float32), 1.0 + tl.exp(-g))


@triton.jit
def _product(gate_up, token, columns, inside, width):
    """h of some columns of one token, in the type of gate_up."""
    at = gate_up + token * 2 * width + columns
    g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    activated = round_to(tl.div_rn(g, 1.0 + tl.exp(-g)), gate_up.dtype.element_ty).to(tl.float32)
    return round_to(activated * u, gate_up.dtype.element_ty)


@triton.jit
def _store_codes(product, a, token, columns, inside, width, x_q, s_x, h):
    """Codes of some columns of one token, and its scale."""
    at = token * width + columns
    if h is not None:
        tl.store(h + at, product, mask=inside)
    codes, scale = quantize_block(product.to(tl.float32), a, -128.0, 127.0)
    tl.store(x_q + at, codes, mask=inside)
    tl.store(s_x + token, scale)


@triton.jit
def _largest(gate_up, token, width, BLOCK: tl.constexpr):
    """max|h| of one token, block by block."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        product = _product(gate_up, token, columns, columns < width, width)
        largest = tl.maximum(largest, finite_abs(product.to(tl.float32)))
    return tl.max(largest, axis=0)


@triton.jit
def swiglu_quantize_kernel(gate_up, x_q, s_x, abs_max, h, width, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """One token, with the maximum in `abs_max` if it is given, else its own; h is stored as well if it is given.

    WHOLE: the token fits a block, and is read once.
    """
    token = tl.program_id(0).to(tl.int64)
    if WHOLE:
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        product = _product(gate_up, token, columns, inside, width)
        a = tl.max(finite_abs(product.to(tl.float32)), axis=0) if abs_max is None else tl.load(abs_max + token)
        _store_codes(product, a, token, columns, inside, width, x_q, s_x, h)
    else:
        a = _largest(gate_up, token, width, BLOCK) if abs_max is None else tl.load(abs_max + token)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < width
            product = _product(gate_up, token, columns, inside, width)
            _store_codes(product, a, token, columns, inside, width, x_q, s_x, h)


@triton.jit
def swiglu_abs_max_kernel(gate_up, abs_max, width, BLOCK: tl.constexpr):
    """max|h| of one token, NaN as +Inf."""
    token = tl.program_id(0).to(tl.int64)
    tl.store(abs_max + token, _largest(gate_up, token, width, BLOCK))


@triton.jit
def swiglu_backward_kernel(dh, gate_up, d_gate_up, width, BLOCK: tl.constexpr):
    """Both gradients of `BLOCK` columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = token * 2 * width + columns
    g = tl.load(gate_up + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(gate_up + at + width, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    s = _sigmoid(g)
    d_gate = d * u * (s + g * s * (1.0 - s))
    element = d_gate_up.dtype.element_ty
    tl.store(d_gate_up + at, round_to(d_gate, element), mask=inside)
    tl.store(d_gate_up + at + width, round_to(d * g * s, element), mask=inside)


def _block(width: int) -> tuple[int, int]:
    """Columns of a block and its warps, for tokens of `width` columns."""
    return row_block(width if width <= _LONGEST_WHOLE else _BLOCK)


def _rows(gate_up: Tensor) -> tuple[Tensor, int]:
    """[..., 2 ffn] as contiguous [tokens, 2 ffn], and ffn; ValueError if the last dimension is no pair of halves."""
    check_device(gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2 ffn], got shape {tuple(gate_up.shape)}")
    return gate_up.reshape(-1, gate_up.shape[-1]).contiguous(), gate_up.shape[-1] // 2


def swiglu_abs_max(gate_up: Tensor) -> Tensor:
    """Return max|h| of each token, fp32 [...], NaN as +Inf.

    Args:
        gate_up: fp32, bf16 or fp16 [..., 2 ffn].

    Raises:
        ValueError: an odd last dimension, no CUDA tensor.
    """
    rows, width = _rows(gate_up)
    abs_max = torch.empty(len(rows), dtype=torch.float32, device=gate_up.device)
    block, warps = _block(width)
    if len(rows):
        swiglu_abs_max_kernel[(len(rows),)](rows, abs_max, width, BLOCK=block, num_warps=warps)
    return abs_max.view(gate_up.shape[:-1])


def swiglu_quantize(
    gate_up: Tensor, *, abs_max: Tensor | None = None, keep_output: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (x_q int8 [..., ffn], s_x fp32 [...], h or None).

    x_q and s_x have the bits of `reference.quantize_activations(h, abs_max=abs_max)`.

    Args:
        gate_up: fp32, bf16 or fp16 [..., 2 ffn].
        abs_max: fp32 [...], over all ranks, where gate_up holds a slice of each token.
        keep_output: whether h [..., ffn] is wanted as well.

    Raises:
        ValueError: shapes that do not fit, no CUDA tensor.
    """
    rows, width = _rows(gate_up)
    tokens = gate_up.shape[:-1]
    if abs_max is not None and abs_max.shape != tokens:
        raise ValueError(f"abs_max has shape {tuple(abs_max.shape)}, expected {tuple(tokens)}: one value per token")
    x_q = torch.empty(len(rows), width, dtype=torch.int8, device=gate_up.device)
    s_x = torch.empty(len(rows), dtype=torch.float32, device=gate_up.device)
    h = rows.new_empty(len(rows), width) if keep_output else None
    given = None if abs_max is None else abs_max.float().contiguous()
    block, warps = _block(width)
    if len(rows):
        swiglu_quantize_kernel[(len(rows),)](
            rows, x_q, s_x, given, h, width, BLOCK=block, WHOLE=width <= block, num_warps=warps
        )
    kept = None if h is None else h.view(*tokens, width)
    return x_q.view(*tokens, width), s_x.view(tokens), kept


def swiglu_backward(dh: Tensor, gate_up: Tensor) -> Tensor:
    """Return the gradient of gate_up, [..., 2 ffn] in its type.

    Args:
        dh: [..., ffn], the gradient of h.
        gate_up: as given to `swiglu_quantize`.

    Raises:
        ValueError: shapes that do not fit, no CUDA tensors.
    """
    rows, width = _rows(gate_up)
    if dh.shape != (*gate_up.shape[:-1], width):
        raise ValueError(f"dh has shape {tuple(dh.shape)}, expected {(*gate_up.shape[:-1], width)}")
    gradient = torch.empty_like(rows)
    if len(rows):
        grid = (len(rows), triton.cdiv(width, 1024))
        swiglu_backward_kernel[grid](dh.reshape(-1, width).contiguous(), rows, gradient, width, BLOCK=1024)
    return gradient.view(gate_up.shape)


_SIGNATURE = {
    **dict.fromkeys(("gate_up", "d_gate_up", "dh", "h"), "*bf16"),
    **{"x_q": "*i8", "s_x": "*fp32", "abs_max": "*fp32", "width": "i32"},
}


def _build(name: str, function: object, width: int, **constexprs: object) -> Build:
    block, warps = _block(width)
    values = {"BLOCK": block, "WHOLE": width <= block, **constexprs}
    return Build(f"swiglu_quantize[{name} {width}]", function, _SIGNATURE, values, warps, aligned=("width",))


BUILDS: tuple[Build, ...] = (
    *(
        build
        for width in (4864, 11008, 18944)
        for build in (
            _build("own maximum", swiglu_quantize_kernel, width, abs_max=None, h=None),
            _build("given maximum", swiglu_quantize_kernel, width, h=None),
            _build("maximum", swiglu_abs_max_kernel, width),
        )
    ),
    Build("swiglu_quantize[backward]", swiglu_backward_kernel, _SIGNATURE, {"BLOCK": 1024}, aligned=("width",)),
)
"""ffn sizes of Qwen2.5 0.5B, 3B and 7B."""
