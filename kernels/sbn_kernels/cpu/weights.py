"""N:M masks and ternary codes on CPU without sorting: a pruned sorting network over blocks that stay in cache.

    T      = |w| with one row per position in a group                 [m, groups]
    lowest = the (m-n+1)-th smallest of each column of T              a network of minima and maxima, [groups]
    cut    = max(lowest, the least |w| of the row that is not rounded to 0)
    C      = copysign(|w| >= cut, w)

Only the comparators that the wanted order statistic depends on are kept (15 of 19 for m = 8), and each is two
vectorised passes, where sorting handles one group of 8 at a time. A column whose lowest survivor equals its largest
loser is a tie at the cut; those groups, rare with fp32 weights, get their mask by counting ranks, lower index first.
Comparisons write fp32, which is converted afterwards: those that write bool are half as fast, and slower still where a
short row meets one value.

"Not rounded to 0" is a comparison as well: rint(fl(w * r)) >= 1 exactly if fl(w * r) > 1/2, and fl is monotonic, so
each row has a least such w (`_least_kept`). Results equal `sbn_kernels.reference` bit for bit.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from sbn_kernels import reference

_BLOCK_ELEMENTS = 1 << 20


@lru_cache(maxsize=64)
def selection_network(size: int, wanted: tuple[int, ...]) -> tuple[tuple[int, int, bool, bool], ...]:
    """Return the comparators (i, j, low, high) that bring the order statistics `wanted` of `size` values into place.

    Each puts min(x_i, x_j) at i, if `low`, and max(x_i, x_j) at j, if `high`. Batcher's merge exchange (Knuth, The Art
    of Computer Programming, vol. 3, algorithm 5.2.2M), less what no wanted output depends on.
    """
    comparators = list(_merge_exchange(size))
    needed = set(wanted)
    kept = []
    for i, j in reversed(comparators):
        if i in needed or j in needed:
            kept.append((i, j, i in needed, j in needed))
            needed |= {i, j}
    return tuple(reversed(kept))


def _merge_exchange(size: int) -> Iterator[tuple[int, int]]:
    """The comparators of algorithm M, for any size."""
    top = 1 << max(size - 1, 1).bit_length() - 1
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            yield from ((i, i + d) for i in range(size - d) if i & p == r)
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2


def _check_matrix(w: Tensor) -> None:
    """Raise ValueError if `w` is not a float matrix."""
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"weights must be a float [out, in] matrix, got {w.dtype} of shape {tuple(w.shape)}")


def _magnitudes(block: Tensor, out: Tensor) -> Tensor:
    """Return `out` = |block|, fp32 [rows, in]; ValueError if it holds NaN or Inf."""
    torch.abs(block if block.dtype == torch.float32 else block.float(), out=out)
    if not bool(out.amax().isfinite()):
        raise ValueError("weights hold NaN or Inf: neither a mask nor codes can be computed from them")
    return out


def _least_kept(reciprocal: Tensor) -> Tensor:
    """The least x with fl(x * r) > 1/2 for each r > 0, fp32: 1/2r is at most two neighbours away from it."""
    x = 0.5 / reciprocal
    zero, infinity = torch.zeros_like(x), torch.full_like(x, torch.inf)
    for _ in range(4):
        below = torch.nextafter(x, zero)
        x = torch.where(below * reciprocal > 0.5, below, x)
    for _ in range(4):
        x = torch.where(x * reciprocal > 0.5, x, torch.nextafter(x, infinity))
    return x


def _transpose_exactly(groups: Tensor, out: Tensor) -> None:
    """out[j, g] = groups[g, j]; through a GEMM with the identity where GEMMs are plain fp32, which is faster."""
    if torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee"):  # type: ignore[attr-defined]
        with torch.autocast("cpu", enabled=False):
            torch.mm(torch.eye(groups.shape[1]), groups.t(), out=out)
    else:
        out.copy_(groups.t())


class _Cutter:
    """Finds the lowest survivor of each group, in buffers that are used again for every block."""

    def __init__(self, n: int, m: int, groups: int) -> None:
        self.n, self.m = n, m
        self.network = selection_network(m, (m - n - 1, m - n))
        self.columns = torch.empty(m, groups)
        self.spare = [torch.empty(groups) for _ in range(m + 2)]

    def cut(self, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
        """|w| [groups, m] -> (lowest survivor fp32 [groups, 1], groups whose largest loser equals it int64 [tied])."""
        count = len(magnitudes)
        columns = self.columns[:, :count]
        _transpose_exactly(magnitudes, columns)
        rows, free = list(columns.unbind(0)), [buffer[:count] for buffer in self.spare]
        owned = [False] * self.m
        for i, j, low, high in self.network:
            x, y = rows[i], rows[j]
            if low:
                rows[i] = torch.minimum(x, y, out=free.pop())
            if high:
                rows[j] = torch.maximum(x, y, out=free.pop())
            free += [old for old, mine in ((x, owned[i]), (y, owned[j])) if mine]
            owned[i], owned[j] = low, high
        lowest, loser = rows[self.m - self.n], rows[self.m - self.n - 1]
        return lowest.unsqueeze(1), (lowest == loser).nonzero().squeeze(1)

    def mask(self, magnitudes: Tensor, lowest: Tensor, tied: Tensor, marks: Tensor, out: Tensor) -> None:
        """Writes the mask, bool [groups, m], for the cut that was found; `marks`: fp32 memory of that shape."""
        out.copy_(torch.ge(magnitudes, lowest, out=marks))
        if len(tied):
            out[tied] = reference.keep_largest(magnitudes[tied], self.n, self.m)


class _Blocks:
    """A weight in blocks of whole rows with about 2^20 elements, and memory for the passes over one of them."""

    def __init__(self, w: Tensor) -> None:
        self.w = w
        self.step = max(1, _BLOCK_ELEMENTS // max(1, w.shape[1]))
        self._magnitudes, self._marks = torch.empty(2, min(self.step, w.shape[0]), w.shape[1]).unbind(0)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, |w| of these rows, fp32 memory of the same shape); ValueError at a block with NaN or Inf."""
        for start in range(0, self.w.shape[0] if self.w.numel() else 0, self.step):
            rows = slice(start, min(start + self.step, self.w.shape[0]))
            count = rows.stop - rows.start
            yield rows, _magnitudes(self.w[rows], self._magnitudes[:count]), self._marks[:count]

    def cutter(self, n: int, m: int) -> _Cutter:
        """Of the blocks' groups."""
        return _Cutter(n, m, self._marks.numel() // m)


def nm_mask(w: Tensor, n: int, m: int) -> Tensor:
    """Return the N:M mask, bool [out, in]: see `reference.nm_mask`."""
    reference.check_sparsity(n, m, w.shape[-1])
    _check_matrix(w)
    mask = torch.ones(w.shape, dtype=torch.bool)
    blocks = _Blocks(w)
    cutter = blocks.cutter(n, m) if n < m else None
    for rows, magnitudes, marks in blocks:
        if cutter is not None:
            groups = magnitudes.view(-1, m)
            cutter.mask(groups, *cutter.cut(groups), marks.view(-1, m), mask[rows].view(-1, m))
    return mask


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
    """Return (codes int8 [out, in], mask bool [out, in] or None): see `reference.codes_from_gamma`.

    Masks from quantized weights are all ties, for which counting ranks is the method: the reference makes them.
    """
    if mask_source != "latent" and mask is None and n < m:
        return reference.codes_from_gamma(w, gamma_per_row, n, m, mask_source=mask_source, with_mask=with_mask)
    reference.check_code_arguments(w, gamma_per_row, n, m, mask_source, mask)
    _check_matrix(w)
    least = _least_kept(torch.ones(()) / gamma_per_row).unsqueeze(1)  # [out, 1]
    codes = torch.empty(w.shape, dtype=torch.int8)
    blocks = _Blocks(w)
    if mask is not None or n == m:
        for rows, magnitudes, marks in blocks:
            _ternary(w[rows], magnitudes, least[rows], marks, codes[rows])
            if mask is not None:
                codes[rows].mul_(mask[rows])
        if mask is None and with_mask:
            mask = torch.ones(w.shape, dtype=torch.bool)
        return codes, mask if with_mask else None
    made = torch.empty(w.shape, dtype=torch.bool) if with_mask else None
    cutter = blocks.cutter(n, m)
    for rows, magnitudes, marks in blocks:
        groups, spare, block = magnitudes.view(-1, m), marks.view(-1, m), codes[rows].view(-1, m)
        lowest, tied = cutter.cut(groups)
        if made is not None:
            cutter.mask(groups, lowest, tied, spare, made[rows].view(-1, m))
        cuts = torch.maximum(lowest.view(len(magnitudes), -1), least[rows]).view(-1, 1)
        _ternary(w[rows].reshape(-1, m), groups, cuts, spare, block)
        if len(tied):
            block[tied] *= reference.keep_largest(groups[tied], n, m)
    return codes, made


def _ternary(values: Tensor, magnitudes: Tensor, cuts: Tensor, marks: Tensor, out: Tensor) -> None:
    """out = copysign(magnitudes >= cuts, values), int8; `marks`: fp32 memory."""
    torch.ge(magnitudes, cuts, out=marks)
    out.copy_(torch.copysign(marks, values, out=marks))
