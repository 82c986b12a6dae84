"""What a checkpoint holds of a run, from this rank and back to it: everything that the next step depends on.

    NAME                          fp32 master weight, by its global name
    optimizer.exp_avg.NAME        Adam's first moment; optimizer.exp_avg_sq.NAME the second
    masks.LAYER                   masks in force, where the weights alone do not give them
    telemetry.masks.LAYER         masks of the last measurement

Weights are sharded over data-parallel replicas as ZeRO keeps their masters, so each element is written once; what
tensor-parallel ranks hold in common is written by the first of them. The parameters themselves are the masters' bits
and need no place of their own; gamma and codes follow from them (docs/method.md, "Once per optimizer step"). No random
generator is saved: the first weights and the order of samples are functions of the seed, and nothing else is random.

A mask is packed by group, uint8 [out, in / M * ceil(M / 8)]: groups never straddle ranks, so neither do bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import sbn_kernels
import torch
from torch import Tensor

from megatron_sbn.checkpoint.manifest import TelemetryState
from megatron_sbn.checkpoint.regions import FlatRange, flat_ranges, shard_ranges
from megatron_sbn.checkpoint.shards import Chunk, Reader
from megatron_sbn.errors import CheckpointError
from megatron_sbn.layers.weight_quantizer import WeightQuantizer
from megatron_sbn.parallel.shard import LogicalParameter, LogicalShard, is_expert
from megatron_sbn.parallel.state import ParallelState
from megatron_sbn.parallel.zero import MASTER, MOMENTS, ZeroOptimizer
from megatron_sbn.telemetry.mask_statistics import Counters, Telemetry

MASKS, TELEMETRY_MASKS = "masks.", "telemetry.masks."


@dataclass(frozen=True)
class ResumableState:
    """The parts of a run that are saved, on this rank."""

    parameters: Sequence[LogicalParameter]
    zero: ZeroOptimizer
    ternary: WeightQuantizer
    telemetry: Telemetry
    parallel: ParallelState

    def chunks(self) -> Iterator[Chunk]:
        """What this rank writes; the values are views where they can be."""
        for logical in self.parameters:
            fragment = self.zero.fragment(logical)
            if fragment is None or not self._writes(logical):
                continue
            for key, flat in fragment.tensors.items():
                name = tensor_name(key, logical.name)
                for run in flat_ranges(logical.shard, fragment.start, flat.numel()):
                    yield _chunk(name, logical.shard, run, flat, fragment.start)
        yield from self._mask_chunks(MASKS, self.ternary.kept_masks(), self.ternary.mask_sparsity)
        counters = self.telemetry.counters()
        sparsity = counters.sparsity if counters else None
        yield from self._mask_chunks(TELEMETRY_MASKS, self.telemetry.references(), sparsity)

    def restore(
        self, reader: Reader, updates: int, masks: tuple[int, int] | None, telemetry: TelemetryState | None
    ) -> None:
        """Takes everything back. Raises CheckpointError for a tensor that is missing or of another shape."""
        self.zero.reset_moments(updates)
        for logical in self.parameters:
            self._restore_weight(reader, logical)
            fragment = self.zero.fragment(logical)
            if fragment is not None:
                for key, flat in fragment.tensors.items():
                    found = flat_ranges(logical.shard, fragment.start, flat.numel())
                    shifted = (FlatRange(run.region, run.start - fragment.start) for run in found)
                    reader.fill(flat, tensor_name(key, logical.name), logical.shard.shape, shifted)
        self.ternary.load_masks(self._read_masks(reader, MASKS, masks), masks)
        if telemetry is None:
            self.telemetry.forget()
        else:
            references = self._read_masks(reader, TELEMETRY_MASKS, telemetry.sparsity)
            self.telemetry.take(Counters(telemetry.step, telemetry.flips, telemetry.sparsity), references)

    def _writes(self, logical: LogicalParameter) -> bool:
        """Whether this rank is the one of those with the same elements that writes them."""
        in_common = not logical.is_expert and logical.shard.shares < self.parallel.tensor.size
        return logical.counts and (self.parallel.tensor.rank == 0 or not in_common)

    def _restore_weight(self, reader: Reader, logical: LogicalParameter) -> None:
        with self.zero.gathered([logical.parameter], write=True):
            # Under ZeRO-3 the first replica's values are sent to the others.
            if self.zero.stage < 3 or self.parallel.data.rank == 0:
                local = torch.empty(logical.parameter.shape, dtype=torch.float32)
                reader.fill(local.view(-1), logical.name, logical.shard.shape, shard_ranges(logical.shard))
                with torch.no_grad():
                    logical.parameter.data.copy_(local)

    def _mask_chunks(
        self, prefix: str, masks: Mapping[str, Tensor], sparsity: tuple[int, int] | None
    ) -> Iterator[Chunk]:
        for name, mask in masks.items():
            assert sparsity is not None, "a mask that is kept has N and M"
            replica = self.parallel.expert_data.rank if is_expert(name) else self.parallel.data.rank
            if replica == 0:
                shard = packed_shard(self.ternary.layers[name].weight_shard, sparsity[1])
                flat = pack_groups(mask, sparsity[1]).view(-1)
                for run in shard_ranges(shard):
                    yield _chunk(prefix + name, shard, run, flat, 0)

    def _read_masks(self, reader: Reader, prefix: str, sparsity: tuple[int, int] | None) -> dict[str, Tensor]:
        """Masks of this rank's layers, bool [out, in]; none where none are saved."""
        if sparsity is None or not any(name.startswith(prefix) for name in reader.manifest.tensors):
            return {}
        m, masks = sparsity[1], {}
        for name, layer in self.ternary.layers.items():
            if layer.weight_shard.shape[1] % m:
                raise CheckpointError(f"{reader.folder}: masks of {name} are of groups of {m}; use its own recipe")
            shard = packed_shard(layer.weight_shard, m)
            rows, columns = layer.store.shape
            packed = torch.empty(rows, columns // m * -(-m // 8), dtype=torch.uint8)
            reader.fill(packed.view(-1), prefix + name, shard.shape, shard_ranges(shard))
            masks[name] = unpack_groups(packed, m).to(layer.store.device)
        return masks


def tensor_name(key: str, parameter: str) -> str:
    """The name of a parameter's master or moment among a checkpoint's tensors."""
    return parameter if key == MASTER else f"optimizer.{key}.{parameter}"


def parameter_names(tensors: Sequence[str]) -> list[str]:
    """The names of parameters among a checkpoint's tensors."""
    other = (MASKS, TELEMETRY_MASKS, *(f"optimizer.{key}." for key in MOMENTS))
    return [name for name in tensors if not name.startswith(other)]


def packed_shard(shard: LogicalShard, m: int) -> LogicalShard:
    """Where the packed masks of a rank's piece of a weight are in the packed mask of the whole."""
    each = -(-m // 8)
    columns = None if shard.columns is None else (shard.columns[0] // m * each, shard.columns[1] // m * each)
    return LogicalShard((shard.shape[0], shard.shape[1] // m * each), shard.rows, columns)


def pack_groups(mask: Tensor, m: int) -> Tensor:
    """bool [out, in] -> uint8 [out, in / m * ceil(m / 8)]."""
    return sbn_kernels.pack_mask(mask.unflatten(-1, (-1, m))).flatten(1)


def unpack_groups(packed: Tensor, m: int) -> Tensor:
    """The inverse of `pack_groups`."""
    return sbn_kernels.unpack_mask(packed.unflatten(-1, (-1, -(-m // 8))), m).flatten(1)


def _chunk(name: str, shard: LogicalShard, run: FlatRange, flat: Tensor, first: int) -> Chunk:
    """A run's values, from the flat tensor that begins at element `first` of the piece."""
    start = run.start - first
    return Chunk(name, shard.shape, run.region, flat[start : start + run.region.numel].view(run.region.sizes))
