"""Logical tensors put together from the shards that ranks hold, and their fingerprints.

Whatever the layout, its shards of one logical tensor cover it exactly once, and ranks that hold the same shard hold
the same bits; `assemble` checks both. So results of two layouts can be compared tensor by tensor, by name.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_sbn.parallel.shard import LogicalShard


@dataclass(frozen=True)
class TensorShard:
    """A rank's part of a logical tensor; `counts` is False for the replica of a tied embedding."""

    shard: LogicalShard
    value: Tensor
    counts: bool = True


TensorShards = dict[str, TensorShard]


def assemble(ranks: Sequence[Mapping[str, TensorShard]]) -> dict[str, Tensor]:
    """Logical tensors from all ranks' shards. Raises ValueError where replicas differ or a part is missing."""
    joined: dict[str, Tensor] = {}
    for name in sorted({name for shards in ranks for name in shards}):
        distinct: dict[LogicalShard, Tensor] = {}
        for rank, shards in enumerate(ranks):
            if name not in shards:
                continue
            part = shards[name]
            known = distinct.setdefault(part.shard, part.value)
            if not torch.equal(known, part.value):
                difference = (known.double() - part.value.double()).abs().max()
                raise ValueError(f"{name}: the replica of rank {rank} differs from another's by {difference}")
        joined[name] = _cover(name, distinct)
    return joined


def _cover(name: str, distinct: Mapping[LogicalShard, Tensor]) -> Tensor:
    shard, value = next(iter(distinct.items()))
    logical = torch.zeros(shard.shape, dtype=value.dtype)
    covered = torch.zeros(shard.shape, dtype=torch.int32)
    for shard, value in distinct.items():
        shard.put(logical, value)
        once = torch.zeros_like(covered)
        shard.put(once, torch.ones(value.shape, dtype=torch.int32))
        covered += once
    if not bool((covered == 1).all()):
        raise ValueError(f"{name}: the ranks' shards do not cover it exactly once")
    return logical


def fingerprint(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes, type and shape; equal for equal bits only."""
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest magnitude of b."""
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


def write_shards(path: Path, shards: Mapping[str, TensorShard]) -> None:
    """One safetensors file; where each shard belongs is in its metadata."""
    places = {name: [p.shard.shape, p.shard.rows, p.shard.columns, p.counts] for name, p in shards.items()}
    tensors = {name: part.value.detach().cpu().contiguous() for name, part in shards.items()}
    save_file(tensors, path, metadata={"shards": json.dumps(places)})


def read_shards(path: Path) -> TensorShards:
    """What `write_shards` wrote."""
    shards: TensorShards = {}
    with safe_open(path, framework="pt") as file:
        for name, (shape, rows, columns, counts) in json.loads(file.metadata()["shards"]).items():
            place = LogicalShard(tuple(shape), tuple((s, n) for s, n in rows), tuple(columns) if columns else None)
            shards[name] = TensorShard(place, file.get_tensor(name), counts)
    return shards
