"""Logical tensors put together from the pieces that ranks hold, and their fingerprints.

Whatever a layout cuts, its pieces of one logical tensor cover it exactly once, and ranks that hold the same piece hold
the same bits; `join` checks both. So results of two layouts can be compared tensor by tensor, by name.
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
class Piece:
    """A rank's part of a logical tensor; `counts` is False for the replica of a tied embedding."""

    shard: LogicalShard
    value: Tensor
    counts: bool = True


Pieces = dict[str, Piece]


def join(ranks: Sequence[Mapping[str, Piece]]) -> dict[str, Tensor]:
    """Logical tensors from all ranks' pieces. Raises ValueError where replicas differ or a part is missing."""
    joined: dict[str, Tensor] = {}
    for name in sorted({name for pieces in ranks for name in pieces}):
        distinct: dict[LogicalShard, Tensor] = {}
        for rank, pieces in enumerate(ranks):
            if name not in pieces:
                continue
            piece = pieces[name]
            known = distinct.setdefault(piece.shard, piece.value)
            if not torch.equal(known, piece.value):
                difference = (known.double() - piece.value.double()).abs().max()
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
        raise ValueError(f"{name}: the ranks' pieces do not cover it exactly once")
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


def write_pieces(path: Path, pieces: Mapping[str, Piece]) -> None:
    """One safetensors file; where each piece belongs is in its metadata."""
    places = {name: [p.shard.shape, p.shard.rows, p.shard.columns, p.counts] for name, p in pieces.items()}
    tensors = {name: piece.value.detach().cpu().contiguous() for name, piece in pieces.items()}
    save_file(tensors, path, metadata={"pieces": json.dumps(places)})


def read_pieces(path: Path) -> Pieces:
    """What `write_pieces` wrote."""
    pieces: Pieces = {}
    with safe_open(path, framework="pt") as file:
        for name, (shape, rows, columns, counts) in json.loads(file.metadata()["pieces"]).items():
            cut = LogicalShard(tuple(shape), tuple((s, n) for s, n in rows), tuple(columns) if columns else None)
            pieces[name] = Piece(cut, file.get_tensor(name), counts)
    return pieces
