"""2:4 codes as the sparse tensor core instruction wants them: half of the bytes, and where they came from.

The instruction is `mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32` (PTX ISA, "Matrix fragments
for sparse mma.m16n8k64", sm_80 and up): D [16, 8] = A [16, 64] @ B [64, 8] + C, A with at most 2 non-zeros in each 4
columns. The weights are A: 16 output features; the tokens are B's 8 columns. Of each group of 4 the two bytes at
positions i < j are kept, and i + 4 j as metadata, all non-zeros among them: 5 bits a weight in all.

Lane l = 4 g + t of a warp holds, with bytes and bits from low to high:

    A  register 2 h + r    rows g + 8 r, columns 32 h + 8 t .. + 7, compressed to four bytes
    E  one register        row g + 8 (t % 2), columns 32 (t // 2) .. + 31, eight groups of four bits (selector 0)
    B  register q          column g, rows 16 q + 4 t .. + 3
    C  c_0 c_1 c_2 c_3     rows g, g, g + 8, g + 8; columns 2 t, 2 t + 1, 2 t, 2 t + 1

A sum may be taken in any order, so the 16 groups of a step are: group t + 4 q of the instruction is group 4 t + q of
memory. Lane 4 g + t then needs bytes 16 t .. 16 t + 15 of token g, one load from X_q as it is: activations are never
repacked. Weights are packed once per optimizer step, [out / 16, in / 64, lane, register], a 16-byte load per lane.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from sbn_kernels.inspection import Build

TILE_ROWS = 16
"""Output features of one instruction."""

STEP = 64
"""Input features of one instruction."""

_STEPS_PER_PROGRAM = 8


@dataclass(frozen=True)
class TwoFourWeight:
    """2:4 codes in fragment order (see the module's docstring), padded with zeros to whole tiles.

    Attributes:
        values: int32 [ceil(out/16), ceil(in/64), 32, 4], the A registers of each lane.
        metadata: int32 [ceil(out/16), ceil(in/64), 32], the E register of each lane.
        out_features, in_features: of the codes.
    """

    values: Tensor
    metadata: Tensor
    out_features: int
    in_features: int


def is_two_four(codes: Tensor) -> bool:
    """Whether int8 codes [out, in] have at most 2 non-zeros in each 4 along in: so for 2:4, and by luck for others."""
    if codes.shape[-1] % 4:
        return False
    return not bool(((codes != 0).unflatten(-1, (-1, 4)).sum(-1) > 2).any())


def _check(codes: Tensor) -> None:
    """Raise ValueError unless `codes` is int8 [out, in] with whole groups of 4."""
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[1] % 4 or 0 in codes.shape:
        raise ValueError(
            f"2:4 codes must be int8 [out, in] with in a multiple of 4, got {codes.dtype} {tuple(codes.shape)}"
        )


def _check_two_four(codes: Tensor) -> None:
    """Raise ValueError if a group of 4 has 3 or 4 non-zeros."""
    if not is_two_four(codes):
        raise ValueError("codes have more than 2 non-zeros in a group of 4: expand them (sliding_window) or use int8")


def pack_two_four(codes: Tensor) -> TwoFourWeight:
    """Pack 2:4 ternary codes int8 [out, in] into fragment order, in PyTorch.

    Raises:
        ValueError: not int8 [out, in] with in a multiple of 4, or more than 2 non-zeros in a group of 4.
    """
    _check(codes)
    _check_two_four(codes)
    out_features, in_features = codes.shape
    padded = pad(codes, (0, -in_features % STEP, 0, -out_features % TILE_ROWS))
    tiles, steps = padded.shape[0] // TILE_ROWS, padded.shape[1] // STEP
    groups = padded.view(tiles, TILE_ROWS, steps, 4, 4, 4).transpose(3, 4).reshape(tiles, TILE_ROWS, steps, 16, 4)
    used = groups != 0
    first = torch.where(used.any(-1), used.to(torch.uint8).argmax(-1), 2).clamp_(max=2)
    last = (3 - used.flip(-1).to(torch.uint8).argmax(-1)).maximum(first + 1)
    pairs = groups.gather(-1, torch.stack([first, last], dim=-1))  # [tiles, 16, steps, 16, 2]
    values = pairs.view(tiles, 2, 8, steps, 2, 4, 4).permute(0, 3, 2, 5, 4, 1, 6)  # [.., g, t, h, r, 4]
    fields = (first | last << 2).view(tiles, 2, 8, steps, 2, 8).permute(0, 3, 2, 4, 1, 5)  # [.., g, t//2, t%2, 8]
    metadata = sum(fields[..., i] << 4 * i for i in range(8))
    assert isinstance(metadata, Tensor)
    return TwoFourWeight(
        values.contiguous().view(torch.int32).reshape(tiles, steps, 32, 4),
        _as_int32(metadata).reshape(tiles, steps, 32),
        out_features,
        in_features,
    )


def _as_int32(bits: Tensor) -> Tensor:
    """The low 32 bits of an int64 tensor below 2^32, as int32 of any sign."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)


@triton.jit
def _pair(word):
    """Positions first < last that keep every non-zero of a group of 4 codes (one int32)."""
    lowest = word & 0x01010101
    mask = ((lowest * 0x01020408) >> 24) & 15
    first = tl.where((mask & 1) != 0, 0, tl.where((mask & 2) != 0, 1, 2))
    last = tl.where((mask & 8) != 0, 3, tl.where((mask & 4) != 0, 2, tl.where((mask & 2) != 0, 1, 0)))
    return first, tl.maximum(last, first + 1)


@triton.jit
def _load_group(codes, row, step, group, out_features, groups):
    """Group `group` (of the instruction) of a step and row: int32, 0 outside of the matrix."""
    column = step * 16 + (group % 4) * 4 + group // 4
    inside = (row < out_features) & (column < groups)
    return tl.load(codes + row.to(tl.int64) * groups + column, mask=inside, other=0)


@triton.jit
def pack_kernel(codes, values, metadata, out_features, groups, steps, BLOCK: tl.constexpr):
    """BLOCK steps of 16 rows; codes int32 [out, groups], results as in `TwoFourWeight`."""
    tile = tl.program_id(0)
    step = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, 32)
    register = tl.arange(0, 4)
    g, t = lane // 4, lane % 4
    row = (tile * 16 + g[:, None] + 8 * (register % 2)[None, :])[None, :, :]  # [1, 32, 4]
    group = (8 * (register // 2)[None, :] + 2 * t[:, None])[None, :, :]
    packed = tl.zeros((BLOCK, 32, 4), tl.int32)
    for i in tl.static_range(2):
        word = _load_group(codes, row, step[:, None, None], group + i, out_features, groups)
        first, last = _pair(word)
        pair = ((word >> (8 * first)) & 255) | (((word >> (8 * last)) & 255) << 8)
        packed |= pair << (16 * i)
    place = (tile * steps + step).to(tl.int64)[:, None, None] * 128 + (lane[:, None] * 4 + register[None, :])[
        None, :, :
    ]
    tl.store(values + place, packed, mask=(step < steps)[:, None, None])
    row = (tile * 16 + g + 8 * (t % 2))[None, :]  # [1, 32]
    fields = tl.zeros((BLOCK, 32), tl.int32)
    for i in tl.static_range(8):
        word = _load_group(codes, row, step[:, None], (8 * (t // 2) + i)[None, :], out_features, groups)
        first, last = _pair(word)
        fields |= (first | (last << 2)) << (4 * i)
    place = (tile * steps + step).to(tl.int64)[:, None] * 32 + lane[None, :]
    tl.store(metadata + place, fields, mask=(step < steps)[:, None])


def pack_two_four_fast(codes: Tensor, *, check: bool = True) -> TwoFourWeight:
    """`pack_two_four` in one pass by a Triton kernel: the same bits.

    Args:
        codes: int8 [out, in], contiguous.
        check: whether to refuse codes that are not 2:4, which waits for the GPU; without it, such codes lose
            non-zeros silently, so leave it out only for codes that were masked 2:4.

    Raises:
        ValueError: as `pack_two_four`, or not contiguous.
    """
    _check(codes)
    if not codes.is_contiguous():
        raise ValueError("2:4 codes must be contiguous to be packed by the kernel: call contiguous() first")
    if check:
        _check_two_four(codes)
    out_features, in_features = codes.shape
    tiles, steps = triton.cdiv(out_features, TILE_ROWS), triton.cdiv(in_features, STEP)
    values = torch.empty(tiles, steps, 32, 4, dtype=torch.int32, device=codes.device)
    metadata = torch.empty(tiles, steps, 32, dtype=torch.int32, device=codes.device)
    grid = (tiles, triton.cdiv(steps, _STEPS_PER_PROGRAM))
    pack_kernel[grid](
        *(codes.view(torch.int32), values, metadata, out_features, in_features // 4, steps), BLOCK=_STEPS_PER_PROGRAM
    )
    return TwoFourWeight(values, metadata, out_features, in_features)


def activation_fragments(x_q: Tensor) -> Tensor:
    """Return the B registers of x_q int8 [tokens, in], int32 [ceil(tokens/8), ceil(in/64), 32, 4]: a permutation.

    The GEMM reads these from x_q itself; this is what it reads, for tests and for kernels that want one stream.
    """
    padded = pad(x_q, (0, -x_q.shape[1] % STEP, 0, -x_q.shape[0] % 8))
    tiles, steps = padded.shape[0] // 8, padded.shape[1] // STEP
    lanes = padded.view(tiles, 8, steps, 4, 16).transpose(1, 2).contiguous()  # [tiles, steps, g, t, 16]
    return lanes.view(torch.int32).view(tiles, steps, 32, 4)


BUILDS = (
    Build(
        "two_four[pack]",
        pack_kernel,
        dict.fromkeys(("codes", "values", "metadata"), "*i32")
        | dict.fromkeys(("out_features", "groups", "steps"), "i32"),
        {"BLOCK": _STEPS_PER_PROGRAM},
    ),
)
"""What `sbn_kernels.inspection` compiles."""
