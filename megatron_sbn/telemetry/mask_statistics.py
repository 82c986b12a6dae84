"""What ternary weights and N:M masks do during training: flips, zeros, dead groups (docs/metrics.md defines each).

    flip_rate = popcount(mask xor reference) / mask bits        reference: the masks at the previous measurement

Counts are integers, summed over the shards of one replica by a single int64 all-reduce (another one for experts, whose
replicas are other ranks), then divided once: a value is the same to the last bit in every layout. Replicas hold equal
weights and are not summed. Masks are made from the weights where forward did not keep them, and remembered at 1 bit a
weight.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sbn_kernels
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sbn.errors import CheckpointError
from megatron_sbn.layers.linear import SparseBitLinear
from megatron_sbn.layers.weight_quantizer import WeightQuantizer
from megatron_sbn.layers.weight_scales import layer_mask
from megatron_sbn.parallel.shard import is_expert
from megatron_sbn.parallel.state import ParallelState


@dataclass(frozen=True)
class Counters:
    """Optimizer steps at the last measurement, mask bits flipped since the first, N and M of the reference masks."""

    step: int
    flips: int
    sparsity: tuple[int, int]


@dataclass(frozen=True)
class _LayerCounts:
    """Int64 scalars of one layer's shard; what does not apply is zero."""

    weights: Tensor
    zeros: Tensor  # of the weight that forward multiplies by
    natural_zeros: Tensor  # codes that are zero before masking
    groups: Tensor
    dead_groups: Tensor
    mask_bits: Tensor
    flips: Tensor

    def stack(self) -> Tensor:
        """[7] int64, in the order of the fields."""
        counts = (self.weights, self.zeros, self.natural_zeros, self.groups, self.dead_groups)
        return torch.stack([*counts, self.mask_bits, self.flips])


class Telemetry:
    """Measures the prepared layers of this rank's pipeline stages, together with the replica's other ranks.

    Every rank calls `measure` at the same steps, after `WeightQuantizer.prepare`.
    """

    def __init__(self, state: WeightQuantizer, parallel: ParallelState) -> None:
        self.state = state
        self.parallel = parallel
        self._step = -1
        self._flips = 0  # of the whole replica, since the first measurement
        self._sparsity = (0, 0)  # that of the reference masks
        self._references: dict[str, Tensor] = {}  # uint8 [out, ceil(in/8)] by layer

    def measure(self, step: int) -> dict[str, float]:
        """Metric values after `step` optimizer steps, equal on every rank; the masks become the new reference.

        A metric without a meaning under the settings in force, or at the first measurement, is absent. Raises
        ValueError for a step before the previous measurement's.
        """
        if step < self._step:
            raise ValueError(f"step {step} comes before step {self._step}, which was measured already")
        layers = self.state.layers
        sparsity = next((layer.settings.sparsity for layer in layers.values()), (1, 1))
        if sparsity != self._sparsity:
            self._references = {}
        compared = bool(self._references)
        counts = self._sum((name for name in layers if not is_expert(name)), self.parallel.model_group)
        if any(is_expert(name) for name in layers):
            counts += self._sum((name for name in layers if is_expert(name)), self.parallel.expert_model_group)
        weights, zeros, natural, groups, dead, bits, flips = counts.tolist()
        self._step, self._sparsity = step, sparsity
        self._flips += flips
        values = {"zero_fraction": zeros / weights}
        if any(layer.prepared.codes is not None for layer in layers.values()):
            values |= {
                "natural_zero_fraction": natural / weights,
                "pruned_nonzero_fraction": (zeros - natural) / weights,
            }
        if groups:
            values["dead_group_fraction"] = dead / groups
        if compared:
            values["flip_rate"] = flips / bits
        if bits:
            values["flip_rate_cumulative"] = self._flips / bits
        return values

    def counters(self) -> Counters | None:
        """What a resumed run needs beside the reference masks, equal on every rank; None before any measurement."""
        return None if self._step < 0 else Counters(self._step, self._flips, self._sparsity)

    def references(self) -> dict[str, Tensor]:
        """The masks at the previous measurement, by layer, bool [out, in]."""
        layers = self.state.layers
        return {name: sbn_kernels.unpack_mask(m, layers[name].store.shape[1]) for name, m in self._references.items()}

    def take(self, counters: Counters, references: Mapping[str, Tensor]) -> None:
        """Takes back what `counters` and `references` gave. Raises CheckpointError where some are missing."""
        if references and references.keys() != self.state.layers.keys():
            raise CheckpointError("telemetry: the masks of some layers are missing; use another checkpoint")
        self._step, self._flips, self._sparsity = counters.step, counters.flips, counters.sparsity
        self._references = {
            name: sbn_kernels.pack_mask(mask).to(self.parallel.device) for name, mask in references.items()
        }

    def forget(self) -> None:
        """As before the first measurement."""
        self._step, self._flips, self._sparsity, self._references = -1, 0, (0, 0), {}

    def _sum(self, names: Iterable[str], group: dist.ProcessGroup) -> Tensor:
        """Counts of these layers over all ranks of `group`, int64 [7]."""
        counts = torch.zeros(7, dtype=torch.int64, device=self.parallel.device)
        for name in names:
            counts += self._measure_layer(name, self.state.layers[name]).stack()
        dist.all_reduce(counts, group=group)
        return counts

    def _measure_layer(self, name: str, layer: SparseBitLinear) -> _LayerCounts:
        mask = _mask(layer)
        used = _used(layer, mask)  # bool [out, in]: not zero in forward
        none = torch.zeros((), dtype=torch.int64, device=used.device)
        natural = _natural_zeros(layer) if layer.prepared.codes is not None else none
        if mask is None:
            return _LayerCounts(none + used.numel(), (~used).sum(), natural, none, none, none, none)
        groups = used.unflatten(-1, (-1, layer.settings.sparsity[1])).any(-1)  # [out, in/M]
        packed = sbn_kernels.pack_mask(mask)
        reference = self._references.get(name)
        self._references[name] = packed
        return _LayerCounts(
            weights=none + used.numel(),
            zeros=(~used).sum(),
            natural_zeros=natural,
            groups=none + groups.numel(),
            dead_groups=(~groups).sum(),
            mask_bits=none + mask.numel(),
            flips=none if reference is None else sbn_kernels.flip_count(packed, reference),
        )


def _mask(layer: SparseBitLinear) -> Tensor | None:
    """The N:M mask in force, bool [out, in]; None at N = M."""
    settings, prepared = layer.settings, layer.prepared
    n, m = settings.sparsity
    if n == m:
        return None
    if prepared.mask is not None:
        return prepared.mask
    if settings.mask_source == "latent":
        return layer_mask(layer, n, m)
    gamma = prepared.gamma_per_row
    assert gamma is not None
    with layer.store.gathered() as weight:
        return sbn_kernels.codes_from_gamma(weight, gamma, n, m, mask_source="quantized", backend=settings.backend)[1]


def _used(layer: SparseBitLinear, mask: Tensor | None) -> Tensor:
    """Where the weight that forward multiplies by is not zero: C of ternary weights, mask * W of dense ones."""
    if layer.prepared.codes is not None:
        return layer.prepared.codes != 0
    with layer.store.gathered() as weight:
        nonzero = weight != 0
    return nonzero if mask is None else nonzero & mask


def _natural_zeros(layer: SparseBitLinear) -> Tensor:
    """How many weights round to zero, masked or not."""
    gamma, (_, m) = layer.prepared.gamma_per_row, layer.settings.sparsity
    assert gamma is not None
    with layer.store.gathered() as weight:
        codes, _ = sbn_kernels.codes_from_gamma(weight, gamma, m, m, backend=layer.settings.backend)
    return (codes == 0).sum()
