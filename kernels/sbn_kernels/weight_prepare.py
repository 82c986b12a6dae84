"""Scales, masks and codes of all weights of a model, in three launches (docs/method.md, sections 2 and 4).

    1   max|w| of every part                                    -> the unit of its exact sum (exact_sum)
    2   sum of rint(|w| / unit) of every part, int64            -> gamma, after an all-reduce each
    3   mask, codes, transposed codes, and flips against the masks before, in one pass over W

A launch covers any number of matrices through tables of addresses, since a model has hundreds of them and a kernel for
each would be bound by launches. Passes 1 and 2 cut every part into runs of 2^14 elements, each reduced by one block of
threads; maxima and integer sums do not depend on how the runs are put together, so atomics are as exact as any order.
Pass 3 works on tiles of 64 rows and about 32 columns, whole groups of M: 4 bytes read and 1 written per fp32 weight, 2
with the transposed codes that the input gradient wants.

The mask: min(N, M - N) times, the largest key of each group is kept or the smallest dropped, whichever is less work,
with key = (bits of |w|, -index): unique, in the order of magnitudes, the lower index first on a tie.
"""

# Triton reads the annotations of kernels itself, so these have none.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.inspection import Build
from sbn_kernels.launch import check_device
from sbn_kernels.reference import check_code_arguments
from sbn_kernels.rounding import finite_abs, fixed_point_terms, rint

_RUN = 1 << 14
_ROWS, _COLUMNS, _WARPS = 64, 32, 8
_MOST_WEIGHTS = 1 << 31
_LAST_KEY = tl.constexpr(1 << 62)


@triton.jit
def abs_max_kernel(addresses, counts, parts, maxima, W: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """max|w| of one run into its part's maximum; bit patterns of floats >= 0 are in the order of the floats."""
    run = tl.program_id(0)
    w = tl.load(addresses + run).to(tl.pointer_type(W))
    count = tl.load(counts + run)
    lanes = tl.arange(0, STEP)
    largest = tl.zeros((STEP,), tl.float32)
    for start in range(0, BLOCK, STEP):
        at = start + lanes
        largest = tl.maximum(largest, finite_abs(tl.load(w + at, mask=at < count, other=0.0).to(tl.float32)))
    bits = tl.max(largest.to(tl.int32, bitcast=True), axis=0)
    tl.atomic_max(maxima + tl.load(parts + run), bits)


@triton.jit
def abs_sum_kernel(addresses, counts, parts, units, totals, W: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Sum of rint(|w| / 2^unit) of one run, added to its part's total."""
    run = tl.program_id(0)
    part = tl.load(parts + run)
    w = tl.load(addresses + run).to(tl.pointer_type(W))
    count = tl.load(counts + run)
    unit = tl.load(units + part).to(tl.int32)
    lanes = tl.arange(0, STEP)
    total = tl.zeros((STEP,), tl.int64)
    for start in range(0, BLOCK, STEP):
        at = start + lanes
        total += fixed_point_terms(tl.load(w + at, mask=at < count, other=0.0).to(tl.float32), unit)
    tl.atomic_add(totals + part, tl.sum(total, axis=0))


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
):
    """Codes of one tile; `tiles` [tiles, 3]: matrix, first row and group; `table` [matrices, 8]: of `_launch_codes`."""
    tile = tl.program_id(0).to(tl.int64)
    matrix = tl.load(tiles + 3 * tile)
    entry = table + 8 * matrix
    out = tl.load(entry + 6).to(tl.int32)
    width = tl.load(entry + 7).to(tl.int32)
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
    if COUNT_FLIPS:
        row_bytes = (width + 7) // 8
        before = tl.load(
            tl.load(entry + 5).to(tl.pointer_type(tl.uint8)) + rows * row_bytes + columns // 8, mask=inside, other=0
        )
        was = (before.to(tl.int32) >> (columns % 8)) & 1
        changed = tl.where(inside, tl.where(kept, 1, 0) ^ was, 0)
        tl.atomic_add(flips + matrix, tl.sum(tl.sum(tl.sum(changed, axis=2), axis=1), axis=0).to(tl.int64))


def _element_type(tensors: Sequence[Tensor]) -> tl.dtype:
    """The Triton type that all `tensors` share; ValueError if they are not contiguous floats of one type."""
    kinds = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1 or not dtypes <= kinds.keys():
        raise ValueError(f"weights of one launch must share one float type, got {sorted(map(str, dtypes))}")
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("weights must be contiguous: their rows are read by address")
    return kinds[dtypes.pop()]


def _runs(parts: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Address, length and part of every run of at most 2^14 elements, int64 each, on the device."""
    pieces = [(piece, part) for part, ranges in enumerate(parts) for piece in ranges if piece.numel()]
    check_device(*(piece for piece, _ in pieces))
    lengths = torch.tensor([piece.numel() for piece, _ in pieces])
    bases = torch.tensor([piece.data_ptr() for piece, _ in pieces])
    repeats = (lengths + _RUN - 1) // _RUN
    which = torch.arange(len(pieces)).repeat_interleave(repeats)
    first = torch.cat([torch.arange(0, n, _RUN) for n in lengths.tolist()])
    addresses = bases[which] + first * pieces[0][0].element_size()
    counts = (lengths[which] - first).clamp(max=_RUN)
    owners = torch.tensor([part for _, part in pieces])[which]
    device = pieces[0][0].device
    return addresses.to(device), counts.to(device), owners.to(device)


def abs_maxima(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return max|w| of each part, fp32 [parts], NaN as +Inf, 0 for an empty one: `exact_sum.part_abs_max` of many.

    Args:
        parts: each a sequence of contiguous views (row ranges of a weight), all of one float type and device.

    Raises:
        ValueError: views that are not contiguous or of different types; no CUDA tensors.
    """
    pieces = [piece for ranges in parts for piece in ranges]
    element = _element_type(pieces)
    maxima = torch.zeros(len(parts), dtype=torch.int32, device=pieces[0].device)
    if any(piece.numel() for piece in pieces):
        addresses, counts, owners = _runs(parts)
        abs_max_kernel[(len(addresses),)](addresses, counts, owners, maxima, W=element, BLOCK=_RUN, STEP=2048)
    return maxima.view(torch.float32)


def fixed_point_sums(parts: Sequence[Sequence[Tensor]], units: Tensor) -> Tensor:
    """Return the exact sum of rint(|w| / 2^unit) of each part, int64 [parts]: `exact_sum.fixed_point_sum` of many.

    Args:
        parts: as for `abs_maxima`, finite.
        units: int64 [parts], from `exact_sum.unit_exponent`.

    Raises:
        ValueError: as `abs_maxima`.
    """
    pieces = [piece for ranges in parts for piece in ranges]
    element = _element_type(pieces)
    totals = torch.zeros(len(parts), dtype=torch.int64, device=pieces[0].device)
    if any(piece.numel() for piece in pieces):
        addresses, counts, owners = _runs(parts)
        abs_sum_kernel[(len(addresses),)](addresses, counts, owners, units, totals, W=element, BLOCK=_RUN, STEP=2048)
    return totals


def _tiles(weights: Sequence[Tensor], m: int, rows: int, groups: int) -> Tensor:
    """Matrix, first row and first group of every tile, int64 [tiles, 3], on CPU."""
    tiles = []
    for index, weight in enumerate(weights):
        down = torch.arange(0, weight.shape[0], rows)
        across = torch.arange(0, -(-weight.shape[1] // m), groups)
        pairs = torch.cartesian_prod(down, across)
        tiles.append(torch.cat([torch.full((len(pairs), 1), index), pairs], dim=1))
    return torch.cat(tiles)


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
    previous: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor] | None, list[Tensor] | None, Tensor | None]:
    """Return (codes, masks, transposed codes, flips) of many weights, in one launch: `reference.codes_from_gamma`.

    Weights must be finite, which `abs_maxima` shows: a check here would be one more pass, and a synchronisation.

    Args:
        weights: contiguous [out, in] of one float type.
        gammas: fp32 [out] each.
        n, m: sparsity; mask_source: "latent" or "quantized".
        masks: bool [out, in] each, used as they are if given.
        with_mask: whether masks are returned; transpose: whether codes [in, out] are.
        previous: packed masks (`packing.pack_mask`) to count flips against.

    Returns:
        codes int8 [out, in]; masks bool [out, in] or None; codes int8 [in, out] or None; flips int64 [weights] or None.

    Raises:
        ValueError: see `reference.codes_from_gamma`, except for the check of NaN; no CUDA tensors.
    """
    for index, (w, gamma) in enumerate(zip(weights, gammas, strict=True)):
        check_code_arguments(w, gamma, n, m, mask_source, None if masks is None else masks[index])
        check_device(w, gamma)
        if w.numel() >= _MOST_WEIGHTS:
            raise ValueError(f"a weight of {tuple(w.shape)} has 2^31 elements or more: cut it over more ranks")
    if n == m:
        m = n = 1  # no groups: any width
    device = weights[0].device
    codes = [torch.empty(w.shape, dtype=torch.int8, device=device) for w in weights]
    turned = [torch.empty(w.shape[::-1], dtype=torch.int8, device=device) for w in weights] if transpose else None
    made = masks
    if masks is None and with_mask:
        made = [torch.empty(w.shape, dtype=torch.bool, device=device) for w in weights]
    flips = None if previous is None else torch.zeros(len(weights), dtype=torch.int64, device=device)
    rows_of = [gamma.float().contiguous() for gamma in gammas]
    columns = (weights, rows_of, codes, made, turned, previous)
    _launch_codes(columns, flips, n, m, from_codes=mask_source == "quantized", read_mask=masks is not None)
    return codes, list(made) if with_mask and made is not None else None, turned, flips


def _launch_codes(
    columns: tuple[Sequence[Tensor] | None, ...],
    flips: Tensor | None,
    n: int,
    m: int,
    *,
    from_codes: bool,
    read_mask: bool,
) -> None:
    """Run `codes_kernel` on a table of addresses: weights, gammas, codes, masks, transposed codes, packed masks."""
    weights, _, _, masks, turned, previous = columns
    assert weights is not None
    addresses = [
        [0 if column is None else column[i].data_ptr() for column in columns] + list(w.shape)
        for i, w in enumerate(weights)
    ]
    device, lanes = weights[0].device, triton.next_power_of_2(m)
    groups = max(_COLUMNS // lanes, 1)
    tiles = _tiles(weights, m, _ROWS, groups).to(device)
    if not len(tiles):
        return
    codes_kernel[(len(tiles),)](
        tiles,
        torch.tensor(addresses, device=device),
        flips,
        W=_element_type(weights),
        N=n,
        M=m,
        LANES=lanes,
        GROUPS=groups,
        ROWS=_ROWS,
        FROM_CODES=from_codes,
        READ_MASK=read_mask,
        WRITE_MASK=masks is not None and not read_mask,
        TRANSPOSE=turned is not None,
        COUNT_FLIPS=previous is not None,
        num_warps=_WARPS,
    )


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
    codes, masks, _, _ = codes_of_many(
        [w.contiguous()],
        [gamma_per_row],
        n,
        m,
        mask_source=mask_source,
        masks=None if mask is None else [mask.contiguous()],
        with_mask=with_mask,
    )
    return codes[0], None if masks is None else masks[0]


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


_TABLES = {
    **dict.fromkeys(("addresses", "counts", "parts", "units", "totals", "tiles", "table", "flips"), "*i64"),
    "maxima": "*i32",
}


def _codes_build(n: int, m: int, name: str = "", **flags: bool) -> Build:
    lanes = triton.next_power_of_2(m)
    constexprs = dict.fromkeys(("FROM_CODES", "READ_MASK", "WRITE_MASK", "TRANSPOSE", "COUNT_FLIPS"), False) | flags
    sizes = {"W": tl.float32, "N": n, "M": m, "LANES": lanes, "GROUPS": max(_COLUMNS // lanes, 1), "ROWS": _ROWS}
    return Build(f"weight_prepare[codes {n}:{m}{name}]", codes_kernel, _TABLES, {**sizes, **constexprs}, _WARPS)


_RUNS = {"W": tl.float32, "BLOCK": _RUN, "STEP": 2048}
BUILDS: tuple[Build, ...] = (
    Build("weight_prepare[maxima]", abs_max_kernel, _TABLES, _RUNS),
    Build("weight_prepare[sums]", abs_sum_kernel, _TABLES, _RUNS),
    *(_codes_build(n, m, TRANSPOSE=True) for n, m in ((6, 8), (4, 8), (2, 4), (5, 6), (16, 32), (1, 1))),
    _codes_build(6, 8, " masks and flips", TRANSPOSE=True, WRITE_MASK=True, COUNT_FLIPS=True),
    _codes_build(6, 8, " kept masks", TRANSPOSE=True, READ_MASK=True),
    _codes_build(6, 8, " quantized", TRANSPOSE=True, FROM_CODES=True),
)
