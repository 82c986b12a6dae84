"""Ranks that hold the same shard of a logical tensor hold the same bits: checked at start, by an exchange of hashes.

Weights are drawn from the seed and each tensor's name, so no rank is sent any; a rank with another version of a
library, another seed or a damaged memory would train a model of its own without a word. Each rank tells, for every
parameter, a hash of where it belongs (name, rows, columns) and one of its bytes: 16 bytes a parameter.
"""

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sbn.errors import NumericalError
from megatron_sbn.parallel.shard import LogicalParameter
from megatron_sbn.parallel.state import ParallelState


def check_replicas(parameters: Sequence[LogicalParameter], parallel: ParallelState) -> None:
    """Raises NumericalError on every rank, naming parameter and ranks, where replicas differ in a bit."""
    hashes = torch.tensor([[_place(p), _content(p.parameter)] for p in parameters], dtype=torch.int64)
    everyone = _gather(hashes.to(parallel.device), parallel.world_size)
    names = {_place(p): p.name for p in parameters}
    by_place: dict[int, dict[int, list[int]]] = {}
    for rank, table in enumerate(everyone):
        for place, content in table.tolist():
            by_place.setdefault(place, {}).setdefault(content, []).append(rank)
    for place, versions in by_place.items():
        if len(versions) > 1:
            told_by = " and ".join(", ".join(map(str, ranks)) for ranks in versions.values())
            error = NumericalError(
                f"{names.get(place, 'a parameter')} differs between ranks {told_by}, which must hold the same bits; "
                "start all ranks with the same recipe and the same versions of everything"
            )
            error.on_every_rank = parallel.rank == 0 or place not in names
            raise error


def _gather(hashes: Tensor, world_size: int) -> list[Tensor]:
    """Every rank's table [parameters of that rank, 2], in the order of ranks."""
    count = torch.tensor([len(hashes)], device=hashes.device)
    counts = [torch.zeros_like(count) for _ in range(world_size)]
    dist.all_gather(counts, count)
    lengths = [int(length) for length in counts]
    padded = hashes.new_zeros(max(lengths), 2)
    padded[: len(hashes)] = hashes
    tables = [torch.zeros_like(padded) for _ in range(world_size)]
    dist.all_gather(tables, padded)
    return [table[:length].cpu() for table, length in zip(tables, lengths, strict=True)]


def _place(logical: LogicalParameter) -> int:
    shard = logical.shard
    return _number(hashlib.sha256(f"{logical.name} {shard.shape} {shard.rows} {shard.columns}".encode()))


def _content(parameter: Tensor) -> int:
    flat = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
    return _number(hashlib.sha256(flat.numpy().tobytes()))


def _number(digest: "hashlib._Hash") -> int:
    """The first 8 bytes as a signed integer."""
    return int.from_bytes(digest.digest()[:8], "little", signed=True)
