"""Ternary codes at 2 bits in plane order, the layout that matrix kernels unpack in registers.

Along k, in blocks of 256 codes that make 64 bytes:

    byte j (0..63) of a block holds the codes k = j + 64 i of the block in bits 2i and 2i+1, i = 0..3
    00 = 0, 01 = +1, 11 = -1 (two's complement); k is padded with the code 0 to a multiple of 256

A block of bytes [rows, 64], shifted left by 6 - 2i and then right by 6 as int8, is the tile of 64 consecutive codes
[rows, 64 i .. 64 i + 63]: no byte is unpacked into neighbours, as in `packing`, so values stay in the thread that
loaded them. 64 codes are two steps of the int8 instruction and four of the bf16 one.

`pack_planes` and `unpack_planes` are the definition in PyTorch; `codes_to_planes` is the kernel.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from sbn_kernels.inspection import Build

BLOCK_CODES = 256
"""Codes of one block along k."""

BLOCK_BYTES = 64
"""Bytes of one block, and codes of one plane."""

_ROWS = 64


def plane_bytes(k: int) -> int:
    """Bytes of a row of k codes."""
    return -(-k // BLOCK_CODES) * BLOCK_BYTES


def pack_planes(codes: Tensor) -> Tensor:
    """Pack codes int8 [rows, k] in {-1, 0, 1} into planes uint8 [rows, ceil(k/256) * 64].

    Raises:
        ValueError: not an int8 matrix, or a value outside {-1, 0, 1}.
    """
    _check_codes(codes)
    if bool(((codes < -1) | (codes > 1)).any()):
        raise ValueError("planes hold codes in {-1, 0, 1}: there are values outside")
    blocks = pad(codes.view(torch.uint8) & 3, (0, -codes.shape[1] % BLOCK_CODES)).unflatten(1, (-1, 4, BLOCK_BYTES))
    bytes_ = blocks[:, :, 0] | (blocks[:, :, 1] << 2) | (blocks[:, :, 2] << 4) | (blocks[:, :, 3] << 6)
    return bytes_.flatten(1)


def unpack_planes(planes: Tensor, k: int) -> Tensor:
    """Unpack planes uint8 [rows, ceil(k/256) * 64] into codes int8 [rows, k].

    Raises:
        ValueError: not uint8, or a width that does not go with k.
    """
    check_planes(planes, k)
    blocks = planes.unflatten(1, (-1, BLOCK_BYTES))
    fields = torch.stack([(blocks << (6 - 2 * i)).view(torch.int8) >> 6 for i in range(4)], dim=2)
    return fields.flatten(1)[:, :k].contiguous()


def check_planes(planes: Tensor, k: int) -> None:
    """Raise ValueError unless `planes` is uint8 [rows, ceil(k/256) * 64]."""
    if planes.dtype != torch.uint8 or planes.dim() != 2 or planes.shape[1] != plane_bytes(k):
        raise ValueError(
            f"planes of {k} codes are uint8 [rows, {plane_bytes(k)}], got {planes.dtype} {tuple(planes.shape)}"
        )


def _check_codes(codes: Tensor) -> None:
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"planes are made of an int8 matrix of codes, got {codes.dtype} {tuple(codes.shape)}")


@triton.jit
def plane_codes(packed, plane):
    """The codes int8 of one plane (0 to 3, known when compiled or not) of a block of bytes."""
    return (packed << tl.cast(6 - 2 * plane, tl.uint8)).to(tl.int8, bitcast=True) >> 6


@triton.jit
def planes_kernel(codes, planes, rows, k, stride_row, stride_k, width, ROWS: tl.constexpr, TRANSPOSE: tl.constexpr):
    """One block of 64 bytes of ROWS rows: planes [rows, width] of codes whose strides along rows and k are given."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    byte = tl.arange(0, 64)
    packed = tl.zeros((ROWS, 64), tl.uint8)
    for plane in tl.static_range(4):
        at = block * 256 + plane * 64 + byte
        if TRANSPOSE:
            # Read along the rows, where the codes are contiguous, and transposed in the kernel.
            inside = (at < k)[:, None] & (row < rows)[None, :]
            read = tl.load(codes + at.to(tl.int64)[:, None] * stride_k + row[None, :], mask=inside, other=0)
            field = tl.trans(read)
        else:
            inside = (row < rows)[:, None] & (at < k)[None, :]
            field = tl.load(codes + row.to(tl.int64)[:, None] * stride_row + at[None, :], mask=inside, other=0)
        packed = packed | ((field & 3).to(tl.uint8) << (2 * plane))
    target = planes + row.to(tl.int64)[:, None] * width + block * 64 + byte[None, :]
    tl.store(target, packed, mask=(row < rows)[:, None])


def codes_to_planes(codes: Tensor, *, transpose: bool = False) -> Tensor:
    """Planes of codes int8 [out, in]: uint8 [out, ceil(in/256) * 64], or with `transpose` of codes^T.

    The planes of codes^T are uint8 [in, ceil(out/256) * 64], made without codes^T in memory. Values outside {-1, 0, 1}
    are not looked for: that would cost a synchronisation a call.

    Raises:
        ValueError: not an int8 matrix.
    """
    _check_codes(codes)
    codes = codes.contiguous()
    rows, k = codes.shape[::-1] if transpose else codes.shape
    width = plane_bytes(k)
    planes = torch.empty(rows, width, dtype=torch.uint8, device=codes.device)
    if planes.numel():
        stride_row, stride_k = codes.stride()[::-1] if transpose else codes.stride()
        grid = (triton.cdiv(rows, _ROWS), width // BLOCK_BYTES)
        planes_kernel[grid](
            codes, planes, rows, k, stride_row, stride_k, width, ROWS=_ROWS, TRANSPOSE=transpose, num_warps=4
        )
    return planes


_SIGNATURE = {"codes": "*i8", "planes": "*u8"} | dict.fromkeys(("rows", "k", "stride_row", "stride_k", "width"), "i32")

BUILDS: tuple[Build, ...] = tuple(
    Build(
        f"planes[{name}]",
        planes_kernel,
        _SIGNATURE,
        {"ROWS": _ROWS, "TRANSPOSE": transpose},
        aligned=("rows", "k", "stride_row", "stride_k", "width"),
    )
    for name, transpose in (("codes", False), ("codes transposed", True))
)
"""Both directions of reading."""
