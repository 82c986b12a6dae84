"""Emulation of `mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32`, from the PTX ISA alone.

Written from the tables of "Matrix Fragments for sparse mma.m16n8k64 with .u8 / .s8 type" and "Sparse matrix storage":
for element i of a lane's fragment, its row and column. It shares nothing with the code that packs.
"""

import torch

ORDERED = (0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110)
"""The meaningful metadata of a group of four; anything else is undefined behaviour."""


def signed_byte(register: torch.Tensor, i: int) -> torch.Tensor:
    return ((register.long() >> 8 * i & 255) ^ 128) - 128


def metadata_lane(row: int, column: int) -> tuple[int, int]:
    """Lane of a quad's metadata (figures 136 and 137) and the lowest bit of the group's four."""
    return 4 * (row % 8) + row // 8 + 2 * (column // 32), 4 * (column % 32 // 4)


def mma_sp(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """D registers int32 [..., 32, 4] of registers a, b, c int32 [..., 32, 4] and metadata e int32 [..., 32]."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2], c.shape[:-2])
    dense_a = torch.zeros(*a.shape[:-2], 16, 64, dtype=torch.long)
    dense_b = torch.zeros(*b.shape[:-2], 64, 8, dtype=torch.long)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(16):
            row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
            first_column = thread * 8 if i < 8 else thread * 8 + 32
            chunk = first_column + 4 * (i % 4 // 2)
            holder, bit = metadata_lane(row, chunk)
            field = e[..., holder].long() >> bit & 15
            assert all(value in ORDERED for value in field.unique().tolist()), "undefined metadata"
            position = field >> 2 * (i % 2) & 3
            value = signed_byte(a[..., lane, i // 4], i % 4)
            dense_a[..., row, chunk : chunk + 4].scatter_(-1, position.unsqueeze(-1), value.unsqueeze(-1))
            k = thread * 4 + (i & 3) + 16 * (i >> 2)
            dense_b[..., k, group] = signed_byte(b[..., lane, i // 4], i % 4)
    product = (dense_a.double() @ dense_b.double()).long()
    d = torch.empty(*batch, 32, 4, dtype=torch.int32)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(4):
            row, column = (group if i < 2 else group + 8), thread * 2 + (i & 1)
            d[..., lane, i] = (product[..., row, column] + c[..., lane, i]).to(torch.int32)
    return d
