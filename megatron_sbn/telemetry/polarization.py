"""How a layer's weights are distributed, and where N:M prunes: the paper's account of why ternary weights tolerate it.

    histogram of W / gamma             one peak for BF16 weights, three (near -1, 0, 1) for ternary ones
    histogram of the threshold         the (N+1)-th largest |W| / gamma of every group: the largest that is pruned

Thresholds below 0.5 prune only what rounds to zero anyway (arXiv 2603.05168). gamma is mean |W| of each logical part,
the layer's own scale where it has one.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sbn.layers.linear import SparseBitLinear


@dataclass(frozen=True)
class Polarization:
    """Histograms over the same bins; what lies outside of them is counted in the outermost.

    Attributes:
        edges: fp64 [bins + 1], from -limit to limit; a bin holds its left edge.
        weights: int64 [bins], of W / gamma.
        thresholds: int64 [bins], one per group; all zero at N = M.
    """

    edges: np.ndarray
    weights: np.ndarray
    thresholds: np.ndarray


def polarization(layer: SparseBitLinear, group: dist.ProcessGroup, bins: int = 120, limit: float = 3.0) -> Polarization:
    """The whole layer's histograms. Every rank of the tensor-parallel `group` calls it and gets the same.

    An expert is whole on its rank: its histograms are that rank's own, without the group.

    Raises ValueError unless `bins` and `limit` are positive.
    """
    if bins < 1 or not limit > 0:
        raise ValueError(f"bins = {bins}, limit = {limit}: both must be positive")
    edges = np.linspace(-limit, limit, bins + 1)
    with layer.store.gathered() as weight:
        scaled = weight.double() / _scales(layer, weight, group).unsqueeze(-1)  # [out, in]
    counts = torch.stack([_histogram(scaled, edges), _histogram(_thresholds(scaled, layer.settings.sparsity), edges)])
    if layer.weight_shard.shares > 1:
        dist.all_reduce(counts, group=group)
    weights, thresholds = counts.cpu().numpy()
    return Polarization(edges, weights, thresholds)


def _scales(layer: SparseBitLinear, weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """gamma of every row, fp64 [out]."""
    if layer.prepared.gamma_per_row is not None:
        return layer.prepared.gamma_per_row.double()
    magnitudes = weight.double().abs()
    rows = [torch.cat([torch.arange(start, start + count) for start, count in part]) for part in layer.part_rows]
    sums = torch.stack([magnitudes[part.to(magnitudes.device)].sum() for part in rows])
    shares = layer.weight_shard.shares
    if shares > 1:
        dist.all_reduce(sums, group=group)
    scales = magnitudes.new_empty(len(magnitudes))
    for part, total in zip(rows, sums, strict=True):
        terms = len(part) * magnitudes.shape[1] * shares
        scales[part.to(scales.device)] = (total / terms).clamp(min=1e-5)
    return scales


def _thresholds(scaled: Tensor, sparsity: tuple[int, int]) -> Tensor:
    n, m = sparsity
    if n == m:
        return scaled.new_empty(0)
    return scaled.abs().unflatten(-1, (-1, m)).sort(dim=-1, descending=True).values[..., n]  # [out, in/M]


def _histogram(values: Tensor, edges: np.ndarray) -> Tensor:
    inner = torch.from_numpy(edges[1:-1]).to(values.device)
    return torch.bincount(torch.bucketize(values.flatten(), inner, right=True), minlength=len(edges) - 1)
