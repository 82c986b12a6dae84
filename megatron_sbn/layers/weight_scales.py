"""gamma of all layers from one MAX and one SUM all-reduce, however the weights are sharded (docs/method.md).

    gamma_p = mean |W_p| over the whole dense part p        [one scale for q, k, v, gate, up, ... each]

The maxima of all parts go in one vector, then their fixed-point sums in another: integer sums do not depend on their
order, so neither does gamma. Under ZeRO-3 the elements are those of this rank's fragment of the flattened weight.
Experts are whole on their rank and take part in no exchange.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import sbn_kernels
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sbn.errors import NumericalError
from megatron_sbn.functional import LinearSettings
from megatron_sbn.layers.linear import SparseBitLinear


@dataclass(frozen=True)
class Part:
    """One logical matrix within a layer's weight: this rank's rows of it, and its global number of terms."""

    layer: str
    ranges: tuple[tuple[int, int], ...]  # (start, length)
    count: int
    sharded: bool  # whether other ranks hold more of it

    def views(self, t: Tensor) -> tuple[Tensor, ...]:
        """The part's rows of a tensor [rows, ...]."""
        return tuple(t[start : start + length] for start, length in self.ranges)

    def elements(self, first: int, flat: Tensor, columns: int) -> tuple[Tensor, ...]:
        """The part's elements among those from `first` on of the flattened weight; maybe none, as one empty tensor."""
        found = []
        for start, length in self.ranges:
            low, high = max(start * columns - first, 0), min((start + length) * columns - first, len(flat))
            if low < high:
                found.append(flat[low:high])
        return tuple(found) or (flat[:0],)


def layer_mask(layer: SparseBitLinear, n: int, m: int) -> Tensor:
    """The N:M mask of a layer's present weight, bool [out, in]."""
    with layer.store.gathered() as weight:
        return sbn_kernels.nm_mask(weight, n, m, backend=layer.settings.backend)


def parts_of(name: str, layer: SparseBitLinear) -> list[Part]:
    """The parts of a layer. Rows or columns are sharded equally, so a part's global count is its local one times tp."""
    columns = layer.store.shape[1]
    shares = layer.weight_shard.shares
    return [
        Part(name, ranges, sum(length for _, length in ranges) * columns * shares, shares > 1 or layer.store.is_sharded)
        for ranges in layer.part_rows
    ]


def row_scales(
    layers: Mapping[str, SparseBitLinear],
    settings: LinearSettings,
    masks: Mapping[str, Tensor],
    holders: dist.ProcessGroup,
) -> dict[str, Tensor]:
    """gamma of every row of every layer, fp32 [out], from one MAX and one SUM all-reduce over `holders`.

    Args:
        masks: by layer; over these survivors the scales of mask_then_quant are taken, else over new ones.
        holders: ranks that together hold each weight once.

    Raises NumericalError, naming the layer, for a weight that is not finite.
    """
    parts = [part for name, layer in layers.items() for part in parts_of(name, layer)]
    parts.sort(key=lambda part: not part.sharded)  # those that take part in the sums come first
    shared = sum(part.sharded for part in parts)
    elements = [_elements(layers[part.layer], part) for part in parts]
    # MAX first: it fixes the unit of the sums, so that they are exact in any order.
    maxima = sbn_kernels.abs_maxima(elements, backend=settings.backend)
    if shared:
        dist.all_reduce(maxima[:shared], dist.ReduceOp.MAX, group=holders)
    for part, finite in zip(parts, maxima.isfinite().tolist(), strict=True):
        if not finite:
            error = NumericalError(f"{part.layer}.weight holds NaN or Inf; resume from the last good checkpoint")
            error.on_every_rank = False  # other pipeline stages do not see it, and rank 0 may be one of those
            raise error
    n, m = settings.sparsity
    survivors = settings.order == "mask_then_quant" and n < m
    counts = [part.count * n // m if survivors else part.count for part in parts]
    count = torch.tensor(counts, dtype=torch.int64, device=maxima.device)
    units = sbn_kernels.unit_exponent(maxima, count)
    kept = None
    if survivors:
        survivors_of = {
            name: masks[name] if name in masks else layer_mask(layer, n, m) for name, layer in layers.items()
        }
        kept = [_elements(layers[part.layer], part, survivors_of[part.layer]) for part in parts]
    totals = sbn_kernels.fixed_point_sums(elements, units, kept, backend=settings.backend)
    if shared:
        dist.all_reduce(totals[:shared], dist.ReduceOp.SUM, group=holders)
    gammas = sbn_kernels.gamma_from_fixed_point(totals, units, count)
    per_row = {name: torch.empty(layer.store.shape[0], device=maxima.device) for name, layer in layers.items()}
    for part, gamma in zip(parts, gammas, strict=True):
        for view in part.views(per_row[part.layer]):
            view.copy_(gamma)
    return per_row


def _elements(layer: SparseBitLinear, part: Part, whole: Tensor | None = None) -> tuple[Tensor, ...]:
    """This rank's elements of a part: of its weight, or of a tensor [out, in] that it has whole."""
    store = layer.store
    first, flat = store.local_shard()
    if whole is not None:
        flat = whole.reshape(-1)[first : first + len(flat)]
    return part.elements(first, flat, store.shape[1])
