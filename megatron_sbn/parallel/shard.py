"""Which part of a logical (global) tensor a rank holds, and the value that every tensor starts with.

A layer's weight has one logical form whatever the layout: QKV rows interleaved per query group as Megatron-Core
stores them, gated FC1 as [gate; up]. A rank holds some row ranges and one column range of it. Initial values are drawn
for the logical tensor from the seed and its global name alone, so every layout starts from the same model.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Between the name of a layer and that of one of its experts, in the names of parameters and modules.
EXPERTS = ".mlp.experts.local_experts."


def is_expert(name: str) -> bool:
    """Whether a parameter, a layer or what is derived from it belongs to one expert of a mixture."""
    return EXPERTS in name


@dataclass(frozen=True)
class LogicalShard:
    """This rank's shard of a logical tensor of shape `shape`.

    `rows` are (start, length) ranges of dim 0 in the order in which they are stored; `columns` is one range of dim 1
    (None: all of it, and for one-dimensional tensors).
    """

    shape: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        """Elements of the logical tensor."""
        return math.prod(self.shape)

    @property
    def shares(self) -> int:
        """How many equal shards the logical tensor is divided into."""
        by_rows = self.shape[0] // sum(length for _, length in self.rows)
        return by_rows if self.columns is None else by_rows * (self.shape[1] // self.columns[1])

    def take(self, full: Tensor) -> Tensor:
        """The stored local tensor, a slice of the logical one."""
        local = torch.cat([full.narrow(0, start, length) for start, length in self.rows])
        return local if self.columns is None else local.narrow(1, *self.columns)

    def put(self, full: Tensor, local: Tensor) -> None:
        """Writes the local tensor into its place in the logical one."""
        offset = 0
        for start, length in self.rows:
            place = full.narrow(0, start, length)
            place = place if self.columns is None else place.narrow(1, *self.columns)
            place.copy_(local.narrow(0, offset, length))
            offset += length


@dataclass(frozen=True)
class LogicalParameter:
    """A parameter of this rank with its global name and its place in the logical tensor."""

    name: str
    parameter: nn.Parameter
    shard: LogicalShard

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to one expert, which only the ranks of its expert-data-parallel group hold."""
        return is_expert(self.name)

    @property
    def counts(self) -> bool:
        """False for the last stage's replica of a tied embedding."""
        return not vars(self.parameter).get("ds_pipe_replicated", False)


def unsharded(shape: tuple[int, ...]) -> LogicalShard:
    """A tensor that every rank holds in full."""
    return LogicalShard(shape, ((0, shape[0]),))


def row_shard(shape: tuple[int, ...], rank: int, size: int) -> LogicalShard:
    """An equal share of the rows."""
    rows = shape[0] // size
    return LogicalShard(shape, ((rank * rows, rows),))


def column_shard(shape: tuple[int, ...], rank: int, size: int) -> LogicalShard:
    """An equal share of the columns."""
    columns = shape[1] // size
    return LogicalShard(shape, ((0, shape[0]),), (rank * columns, columns))


def gated_shard(shape: tuple[int, ...], rank: int, size: int) -> LogicalShard:
    """An equal share of the gate rows (the first half) followed by the same share of the up rows."""
    half = shape[0] // 2
    rows = half // size
    return LogicalShard(shape, ((rank * rows, rows), (half + rank * rows, rows)))


def initial_normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """fp32 values of mean 0 and deviation `std` that depend on the seed and the global name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
