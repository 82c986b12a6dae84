"""Masks and codes of all weights of a model, in one launch (docs/method.md, "Forward"), from their scales.

One pass over W writes all that the GEMMs read: codes, transposed codes for the input gradient, codes at 2 bits in
planes (planes.py), masks, and flips against the masks before. Scales are made by two launches before (weight_sums).

A launch covers any number of matrices through a table of addresses, since a model has hundreds of them and a kernel for
each would be bound by launches. It works on tiles of whole groups of M: 64 rows and about 32 columns, or 16 rows and
the 256 columns of a block of planes; 4 bytes read and 1 written per fp32 weight, 2 with the transposed codes that the
input gradient wants, a quarter more with planes.

The mask: min(N, M - N) times, the largest key of each group is kept or the smallest dropped, whichever is less work,
with key = (bits of |w|, -index): unique, in the order of magnitudes, the lower index first on a tie.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.formats.planes import BLOCK_CODES, codes_to_planes, plane_bytes
from sbn_kernels.gpu.primitives.launch import check_device
from sbn_kernels.gpu.primitives.rounding import rint
from sbn_kernels.gpu.weights.weight_sums import abs_maxima, element_type
from sbn_kernels.inspection import Build
from sbn_kernels.reference import check_code_arguments

_ROWS, _COLUMNS, _WARPS = 64, 32, 8
_PLANE_ROWS = 16
_MOST_WEIGHTS = 1 << 31
_LAST_KEY = tl.constexpr(1 << 62)


@triton.jit
def keep_largest(magnitude, lane, N: tl.constexpr, M: tl.constexpr):
    """Mask of int32 magnitudes [.., .., lanes] >= 0: the N largest of the first M lanes, the lower lane on a tie."""
    key = (magnitude.to(tl.int64) << 5) | (31 - lane).to(tl.int64)
    if N <= M - N:
        key = tl.where(lane < M, key, -1)
        for _ in tl.static_range(N):
            key = tl.where(key == tl.max(key, axis=2, keep_dims=True), -1, key)
        kept = key < 0
    else:
        key = tl.where(lane < M, key, _LAST_KEY)
        for _ in tl.static_range(M - N):
            key = tl.where(key == tl.min(key, axis=2, keep_dims=True), _LAST_KEY, key)
        kept = key < _LAST_KEY
    return kept


@triton.jit
def store_planes(planes, codes, rows, block, out, width):
    """One block of planes [rows, 64] of codes [rows, groups, lanes] that are 256 columns, 0 beyond the width."""
    fields = tl.reshape(codes, (rows.shape[0], 4, 64)).to(tl.int32) & 3
    packed = tl.sum(fields << (2 * tl.arange(0, 4))[None, :, None], axis=1).to(tl.uint8)
    at = rows[:, None] * ((width + 255) // 256 * 64) + block * 64 + tl.arange(0, 64)[None, :]
    tl.store(planes + at, packed, mask=(rows < out)[:, None])


@triton.jit
def codes_kernel(
    tiles,
    table,
    flips,
    W: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    FROM_CODES: tl.constexpr,
    READ_MASK: tl.constexpr,
    WRITE_MASK: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    COUNT_FLIPS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Codes of one tile; `tiles` [tiles, 3]: matrix, first row and group; `table` [matrices, 9]: of `_launch_codes`."""
    tile = tl.program_id(0).to(tl.int64)
    matrix = tl.load(tiles + 3 * tile)
    entry = table + 9 * matrix
    out = tl.load(entry + 7).to(tl.int32)
    width = tl.load(entry + 8).to(tl.int32)
    rows = tl.load(tiles + 3 * tile + 1).to(tl.int32) + tl.arange(0, ROWS)[:, None, None]
    groups = tl.load(tiles + 3 * tile + 2).to(tl.int32) + tl.arange(0, GROUPS)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    columns = groups * M + lane
    inside = (rows < out) & (columns < width) & (lane < M)
    at = rows * width + columns
    w = tl.load(tl.load(entry).to(tl.pointer_type(W)) + at, mask=inside, other=0.0).to(tl.float32)
    gamma = tl.load(tl.load(entry + 1).to(tl.pointer_type(tl.float32)) + rows, mask=rows < out, other=1.0)
    reciprocal = tl.div_rn(tl.full(gamma.shape, 1.0, tl.float32), gamma)
    # Beyond 2 the sign is all that matters, and rint is exact.
    rounded = rint(tl.minimum(tl.maximum(w * reciprocal, -2.0), 2.0))
    codes = tl.minimum(tl.maximum(rounded, -1.0), 1.0).to(tl.int8)
    if READ_MASK:
        kept = tl.load(tl.load(entry + 3).to(tl.pointer_type(tl.int8)) + at, mask=inside, other=0) != 0
        codes = tl.where(kept, codes, 0)
    elif N < M:
        if FROM_CODES:  # noqa: SIM108 (one branch is compiled, whose type is then the only one)
            magnitude = tl.where(codes != 0, 1, 0)
        else:
            magnitude = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        kept = keep_largest(magnitude, lane, N, M)
        codes = tl.where(kept, codes, 0)
    else:
        kept = lane < M
    tl.store(tl.load(entry + 2).to(tl.pointer_type(tl.int8)) + at, codes, mask=inside)
    if WRITE_MASK:
        stored = tl.where(kept, 1, 0).to(tl.int8) + tl.zeros(codes.shape, tl.int8)
        tl.store(tl.load(entry + 3).to(tl.pointer_type(tl.int8)) + at, stored, mask=inside)
    if TRANSPOSE:
        tl.store(tl.load(entry + 4).to(tl.pointer_type(tl.int8)) + columns * out + rows, codes, mask=inside)
    if PLANES:
        planes = tl.load(entry + 6)
        if planes != 0:
            block = tl.load(tiles + 3 * tile + 2).to(tl.int32) * M // 256
            store_planes(planes.to(tl.pointer_type(tl.uint8)), codes, tl.reshape(rows, (ROWS,)), block, out, width)
    if COUNT_FLIPS:
        row_bytes = (width + 7) // 8
        before = tl.load(
            tl.load(entry + 5).to(tl.pointer_type(tl.uint8)) + rows * row_bytes + columns // 8, mask=inside, other=0
        )
        was = (before.to(tl.int32) >> (columns % 8)) & 1
        changed = tl.where(inside, tl.where(kept, 1, 0) ^ was, 0)
        tl.atomic_add(flips + matrix, tl.sum(tl.sum(tl.sum(changed, axis=2), axis=1), axis=0).to(tl.int64))


def _tiles(weights: Sequence[Tensor], m: int, rows: int, groups: int) -> Tensor:
    """Matrix, first row and first group of every tile, int64 [tiles, 3], on CPU."""
    tiles = []
    for index, weight in enumerate(weights):
        down = torch.arange(0, weight.shape[0], rows)
        across = torch.arange(0, -(-weight.shape[1] // m), groups)
        pairs = torch.cartesian_prod(down, across)
        tiles.append(torch.cat([torch.full((len(pairs), 1), index), pairs], dim=1))
    return torch.cat(tiles)


@dataclass(frozen=True)
class ManyCodes:
    """What one launch made of weights [out, in]; None is what was not asked for.

    Attributes:
        codes: int8 [out, in] each.
        masks: bool [out, in] each.
        codes_t: the codes as int8 [in, out] each.
        planes: uint8 [out, ceil(in/256) * 64] each (planes.py), None for a weight whose planes were not asked for.
        flips: int64 [weights].
    """

    codes: list[Tensor]
    masks: list[Tensor] | None
    codes_t: list[Tensor] | None
    planes: list[Tensor | None]
    flips: Tensor | None


def codes_of_many(
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    n: int,
    m: int,
    *,
    mask_source: str = "latent",
    masks: Sequence[Tensor] | None = None,
    with_mask: bool = False,
    transpose: bool = False,
    planes: Sequence[bool] = (),
    previous: Sequence[Tensor] | None = None,
) -> ManyCodes:
    """Return the codes of many weights, made in one launch: `reference.codes_from_gamma`.

    Weights must be finite, which `abs_maxima` shows: a check here would be one more pass, and a synchronisation.
    A block of planes is made of whole groups where M is a power of two; for others planes take a launch each.

    Args:
        weights: contiguous [out, in] of one float type.
        gammas: fp32 [out] each.
        n, m: sparsity; mask_source: "latent" or "quantized".
        masks: bool [out, in] each, used as they are if given.
        with_mask: whether masks are returned; transpose: whether codes [in, out] are.
        planes: of which weights planes are; none if empty.
        previous: packed masks (`packing.pack_mask`) to count flips against.

    Raises:
        ValueError: see `reference.codes_from_gamma`, except for the check of NaN; no CUDA tensors.
    """
    for index, (w, gamma) in enumerate(zip(weights, gammas, strict=True)):
        check_code_arguments(w, gamma, n, m, mask_source, None if masks is None else masks[index])
        check_device(w, gamma)
        if w.numel() >= _MOST_WEIGHTS:
            raise ValueError(f"a weight of {tuple(w.shape)} has 2^31 elements or more: shard it over more ranks")
    if n == m:
        m = n = 1  # no groups: any width
    device = weights[0].device
    codes = [torch.empty(w.shape, dtype=torch.int8, device=device) for w in weights]
    codes_t = [torch.empty(w.shape[::-1], dtype=torch.int8, device=device) for w in weights] if transpose else None
    made = masks
    if masks is None and with_mask:
        made = [torch.empty(w.shape, dtype=torch.bool, device=device) for w in weights]
    flips = None if previous is None else torch.zeros(len(weights), dtype=torch.int64, device=device)
    rows_of = [gamma.float().contiguous() for gamma in gammas]
    wanted = list(planes) or [False] * len(weights)
    in_pass = BLOCK_CODES % m == 0
    packed = [
        torch.empty(len(w), plane_bytes(w.shape[1]), dtype=torch.uint8, device=device) if want and in_pass else None
        for w, want in zip(weights, wanted, strict=True)
    ]
    tables = (rows_of, codes, made, codes_t, previous, packed)
    _launch_codes(weights, tables, flips, n, m, from_codes=mask_source == "quantized", read_mask=masks is not None)
    if not in_pass:
        packed = [codes_to_planes(c) if want else None for c, want in zip(codes, wanted, strict=True)]
    return ManyCodes(codes, list(made) if with_mask and made is not None else None, codes_t, packed, flips)


def _launch_codes(
    weights: Sequence[Tensor],
    tables: tuple[Sequence[Tensor | None] | None, ...],
    flips: Tensor | None,
    n: int,
    m: int,
    *,
    from_codes: bool,
    read_mask: bool,
) -> None:
    """Run `codes_kernel` on a table of addresses: of `weights`, then of what `tables` hold, in its order."""
    _, _, masks, codes_t, previous, packed = tables
    assert packed is not None
    addresses = [
        [_address(None if column is None else column[i]) for column in (weights, *tables)] + list(w.shape)
        for i, w in enumerate(weights)
    ]
    with_planes = any(planes is not None for planes in packed)
    sizes = _tile_sizes(m, planes=with_planes)
    device = weights[0].device
    tiles = _tiles(weights, m, sizes["ROWS"], sizes["GROUPS"]).to(device)
    if not len(tiles):
        return
    codes_kernel[(len(tiles),)](
        tiles,
        torch.tensor(addresses, device=device),
        flips,
        W=element_type(weights),
        N=n,
        M=m,
        **sizes,
        FROM_CODES=from_codes,
        READ_MASK=read_mask,
        WRITE_MASK=masks is not None and not read_mask,
        TRANSPOSE=codes_t is not None,
        COUNT_FLIPS=previous is not None,
        PLANES=with_planes,
        num_warps=_WARPS,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tile_sizes(m: int, *, planes: bool) -> dict[str, int]:
    lanes = triton.next_power_of_2(m)
    columns, rows = (BLOCK_CODES, _PLANE_ROWS) if planes else (_COLUMNS, _ROWS)
    return {"LANES": lanes, "GROUPS": max(columns // lanes, 1), "ROWS": rows}


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
    """Return (codes int8 [out, in], mask bool or None) of one weight: see `reference.codes_from_gamma`."""
    check_code_arguments(w, gamma_per_row, n, m, mask_source, mask)
    _check_finite(w)
    made = codes_of_many(
        [w.contiguous()],
        [gamma_per_row],
        n,
        m,
        mask_source=mask_source,
        masks=None if mask is None else [mask.contiguous()],
        with_mask=with_mask,
    )
    return made.codes[0], None if made.masks is None else made.masks[0]


def nm_mask(w: Tensor, n: int, m: int) -> Tensor:
    """Return the N:M mask, bool [out, in]: see `reference.nm_mask`."""
    ones = torch.ones(w.shape[0] if w.dim() else 0, device=w.device)
    _, mask = codes_from_gamma(w, ones, n, m)
    assert mask is not None
    return mask


def _check_finite(w: Tensor) -> None:
    """Raise ValueError if `w` is not a float matrix or holds NaN or Inf."""
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"weights must be a float [out, in] matrix, got {w.dtype} of shape {tuple(w.shape)}")
    if not bool(abs_maxima([[w.contiguous()]]).isfinite().all()):
        raise ValueError("weights hold NaN or Inf: neither a mask nor codes can be computed from them")


_TABLES = dict.fromkeys(("tiles", "table", "flips"), "*i64")


def _codes_build(n: int, m: int, name: str = "", **flags: bool) -> Build:
    names = ("FROM_CODES", "READ_MASK", "WRITE_MASK", "TRANSPOSE", "COUNT_FLIPS", "PLANES")
    constexprs = dict.fromkeys(names, False) | flags
    sizes = {"W": tl.float32, "N": n, "M": m, **_tile_sizes(m, planes=constexprs["PLANES"])}
    return Build(f"weight_prepare[codes {n}:{m}{name}]", codes_kernel, _TABLES, {**sizes, **constexprs}, _WARPS)


BUILDS: tuple[Build, ...] = (
    *(_codes_build(n, m, TRANSPOSE=True) for n, m in ((6, 8), (4, 8), (2, 4), (5, 6), (16, 32), (1, 1))),
    _codes_build(6, 8, " masks and flips", TRANSPOSE=True, WRITE_MASK=True, COUNT_FLIPS=True),
    _codes_build(6, 8, " kept masks", TRANSPOSE=True, READ_MASK=True),
    _codes_build(6, 8, " quantized", TRANSPOSE=True, FROM_CODES=True),
    *(_codes_build(n, m, " planes", TRANSPOSE=True, PLANES=True) for n, m in ((6, 8), (2, 4), (16, 32), (1, 1))),
)
