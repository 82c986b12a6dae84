"""An int8 matrix transposed: out[c, r] = t[r, c], in square blocks, so that both sides are read and written in rows.

Rows of the result may be filled up with zeros to a multiple of a kernel's step, which then needs no masks inside them,
and reads them 16 bytes at once.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.inspection import Build

_BLOCK = 64


@triton.jit
def transpose_int8_kernel(t, out, rows, columns, stride, BLOCK: tl.constexpr):
    """out[columns, stride] of int8 t [rows, columns]; zeros from rows to stride."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    block = tl.load(t + r.to(tl.int64)[:, None] * columns + c[None, :], mask=inside, other=0)
    transposed = tl.trans(block)
    inside = (c < columns)[:, None] & (r < stride)[None, :]
    tl.store(out + c.to(tl.int64)[:, None] * stride + r[None, :], transposed, mask=inside)


def transpose_int8(t: Tensor, multiple: int = 1) -> Tensor:
    """Return the int8 matrix t [rows, columns] as contiguous [columns, rows], zeros after rows to a `multiple`.

    Raises:
        ValueError: not an int8 matrix.
    """
    if t.dtype != torch.int8 or t.dim() != 2:
        raise ValueError(f"transpose_int8 takes an int8 matrix, got {t.dtype} {tuple(t.shape)}")
    rows, columns = t.shape
    stride = triton.cdiv(rows, multiple) * multiple
    out = t.new_empty(columns, stride)
    if out.numel():
        grid = (triton.cdiv(stride, _BLOCK), triton.cdiv(columns, _BLOCK))
        transpose_int8_kernel[grid](t.contiguous(), out, rows, columns, stride, BLOCK=_BLOCK)
    return out


BUILDS: tuple[Build, ...] = (
    Build(
        "transpose[int8]",
        transpose_int8_kernel,
        {"t": "*i8", "out": "*i8", "rows": "i32", "columns": "i32", "stride": "i32"},
        {"BLOCK": _BLOCK},
        aligned=("rows", "columns", "stride"),
    ),
)
"""The kernel at aligned sizes."""
