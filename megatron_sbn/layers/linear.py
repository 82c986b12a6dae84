"""Column- and row-parallel Sparse-BitNet linear layers, built and called as Megatron-Core builds and calls its own.

The arithmetic is that of `functional`; what differs between one device and a shard is which tensors cross ranks
(collectives.py).

gamma, masks and codes are not made here: `WeightQuantizer` makes those of all layers once per optimizer step and leaves
them in `prepared`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor, nn

from megatron_sbn.functional import PLAIN_QUANTIZER, LinearSettings, PreparedWeight, apply_linear
from megatron_sbn.functional.collectives import LocalCollectives
from megatron_sbn.functional.input_quantizers import Quantizer, RmsNormQuantizer, can_fuse
from megatron_sbn.functional.weight_handle import LocalWeight
from megatron_sbn.layers.collectives import ColumnParallelCollectives, RowParallelCollectives
from megatron_sbn.layers.norm import RMSNorm
from megatron_sbn.parallel.shard import LogicalShard, column_shard, gated_shard, row_shard, unsharded

# What Megatron-Core 0.16 to 0.19 hands to a linear layer and this one has no use for. Anything else is an error.
IGNORED_AT_CONSTRUCTION = frozenset(
    {
        "init_method",  # values follow from the seed and the name: parallel/shard.py
        "skip_bias_add",  # see `returns_bias`
        "is_expert",  # experts.py builds its own
        "tp_comm_buffer_name",  # of Transformer Engine's overlap
        "stride",  # of Megatron-Core's own checkpoints
        "name",
        "embedding_activation_buffer",  # None unless defer_embedding_wgrad_compute, which no recipe sets
        "grad_output_buffer",
    }
)
IGNORED_IN_FORWARD = frozenset({"runtime_gather_output"})  # None from GPTModel: logits stay sharded

DENSE = LinearSettings(weight_format="dense", sparsity=(8, 8))
NOT_PREPARED = PreparedWeight()


def check_ignored(given: Mapping[str, object], ignored: frozenset[str]) -> None:
    """Raise TypeError for an argument that is not among those which may be ignored."""
    unknown = sorted(set(given) - ignored)
    if unknown:
        raise TypeError(f"unknown to Sparse-BitNet's linear layers: {', '.join(unknown)}; another Megatron-Core?")


class SparseBitLinear(nn.Module):
    """What column- and row-parallel layers share: the parameters, and the prepared codes.

    Attributes:
        weight: latent weight, [out, in] of this rank, `config.params_dtype`.
        part_rows: rows (start, length) of every logical part of this rank's weight; part p has scale gamma_p.
        global_rows, global_columns: shape of the logical weight.
        settings, prepared: set by `WeightQuantizer` before the first forward and after every optimizer step.
        returns_bias: whether the caller adds the bias. Megatron-Core's `skip_bias_add` is not followed: the sum of a
            bf16 output and an fp32 bias is fp32, and so would be all that follows. Here it is added before the only
            rounding.
    """

    returns_bias = False
    layout: LocalCollectives
    weight_shard: LogicalShard
    bias_shard: LogicalShard | None

    def __init__(self, config: ModelParallelConfig) -> None:
        super().__init__()
        self.config = config
        self.settings = DENSE
        self.prepared = NOT_PREPARED
        self.allows_4bit_input = False  # whether the 4-bit activation option applies (QKV and FC1 inputs)
        self.bias: nn.Parameter | None = None
        self._attached: LocalWeight | None = None
        self._norm: tuple[RMSNorm, ...] = ()  # a tuple, so that the norm is no part of this module

    @property
    def fuses_input(self) -> bool:
        """Whether what makes this layer's input is done by its own kernel, as things stand at this step."""
        return self.prepared.codes is not None and can_fuse(self.settings, self.prepared.codes.device)

    def fuse_norm(self, norm: RMSNorm) -> None:
        """Lets this layer apply the norm before it, whose output nothing else reads, wherever one kernel does both."""
        self._norm = (norm,)
        norm.fused = lambda: self.fuses_input

    def _allocate(self, weight_shape: tuple[int, int], bias_size: int | None) -> None:
        device = torch.get_default_device() if not torch.cuda.is_available() else torch.cuda.current_device()
        make = {"dtype": self.config.params_dtype, "device": device}
        self.weight = nn.Parameter(torch.zeros(weight_shape, **make))
        if bias_size is not None:
            self.bias = nn.Parameter(torch.zeros(bias_size, **make))

    def attach_weight(self, store: LocalWeight) -> None:
        """Leaves the weight to `store`, and takes it off the module's list: ZeRO-3 gathers what is on it for forward.

        The parameter itself stays where optimizer and checkpoints know it, and readable as `weight`.
        """
        weight = self._parameters.pop("weight")
        object.__setattr__(self, "weight", weight)
        self._attached = store

    @property
    def store(self) -> LocalWeight:
        """The weight as its readers see it, whole or sharded over data parallelism; its shape is the true one."""
        return self._attached or LocalWeight(self.weight)

    @property
    def part_rows(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """For each part, the (start, length) ranges of this rank's rows that belong to it."""
        return (((0, self.store.shape[0]),),)

    def shards(self) -> dict[str, LogicalShard]:
        """The logical place of every parameter, by its name in this module."""
        shards = {"weight": self.weight_shard}
        return shards | {"bias": self.bias_shard} if self.bias_shard is not None else shards

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "SparseBitLinear":
        self.prepared = NOT_PREPARED  # moved or converted weights need new codes
        return super()._apply(fn, recurse)

    def forward(
        self, x: Tensor, weight: Tensor | None = None, *, quantizer: Quantizer = PLAIN_QUANTIZER, **ignored: object
    ) -> tuple[Tensor, Tensor | None]:
        """[tokens, batch, in] -> ([tokens, batch, out], bias where the caller adds it, else None)."""
        check_ignored(ignored, IGNORED_IN_FORWARD)
        own_bias = None if self.returns_bias else self.bias
        used = self.store if weight is None else weight
        norm_weight = None
        if self._norm and self.fuses_input:
            quantizer, norm_weight = RmsNormQuantizer(self._norm[0].eps), self._norm[0].weight
        y = apply_linear(
            *(x, used, own_bias, self.prepared, self.settings, self.layout),
            quantizer=quantizer,
            norm_weight=norm_weight,
        )
        return y, self.bias if self.returns_bias else None


class ColumnParallelLinear(SparseBitLinear):
    """Y = X W^T with the rows of W sharded over the tensor-parallel group.

    Shapes: X [tokens (/tp under sequence parallelism), batch, in] -> Y [tokens, batch, out/tp].
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ModelParallelConfig,
        tp_group: dist.ProcessGroup,
        bias: bool,
        gather_output: bool = False,
        skip_weight_param_allocation: bool = False,
        **ignored: object,
    ) -> None:
        check_ignored(ignored, IGNORED_AT_CONSTRUCTION)
        super().__init__(config)
        if gather_output:
            raise ValueError("gather_output is not supported: outputs stay sharded over the tensor-parallel group")
        rank, size = tp_group.rank(), tp_group.size()
        self.sequence_parallel = config.sequence_parallel
        self.layout = ColumnParallelCollectives(tp_group, config.sequence_parallel)
        self.weight_shard = self._shard_of((output_size, input_size), rank, size)
        self.bias_shard = self._shard_of((output_size,), rank, size) if bias else None
        if skip_weight_param_allocation:
            self.register_parameter("weight", None)
            return
        self._allocate((output_size // size, input_size), output_size // size if bias else None)
        for parameter in self.parameters():
            parameter.tensor_model_parallel = size > 1  # type: ignore[attr-defined]

    def _shard_of(self, shape: tuple[int, ...], rank: int, size: int) -> LogicalShard:
        return row_shard(shape, rank, size)


class QkvLinear(ColumnParallelLinear):
    """Fused query, key and value projection; rows are interleaved per query group, `[q..q k v]`, as Megatron-Core's.

    Three logical parts, each with its own gamma. A rank holds whole query groups.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.allows_4bit_input = True
        self.head_dim = config.kv_channels
        self.heads_per_group = config.num_attention_heads // config.num_query_groups

    @property
    def part_rows(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Rows of q, k and v."""
        widths = (self.heads_per_group * self.head_dim, self.head_dim, self.head_dim)
        offsets = (0, widths[0], widths[0] + widths[1])
        groups = range(0, self.store.shape[0], sum(widths))
        return tuple(tuple((g + o, w) for g in groups) for o, w in zip(offsets, widths, strict=True))


class GatedLinear(ColumnParallelLinear):
    """Fused gate and up projection of a gated MLP; a rank holds [gate rows; up rows]. Two parts, two gammas."""

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(input_size, output_size, **kwargs)
        self.allows_4bit_input = True

    @property
    def part_rows(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Rows of gate and up."""
        half = self.store.shape[0] // 2
        return (((0, half),), ((half, half),))

    def _shard_of(self, shape: tuple[int, ...], rank: int, size: int) -> LogicalShard:
        return gated_shard(shape, rank, size)


class RowParallelLinear(SparseBitLinear):
    """Y = X W^T with the columns of W sharded over the tensor-parallel group.

    Shapes: X [tokens, batch, in/tp] -> Y [tokens (/tp under sequence parallelism), batch, out].
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: ModelParallelConfig,
        tp_group: dist.ProcessGroup,
        bias: bool,
        input_is_parallel: bool,
        **ignored: object,
    ) -> None:
        check_ignored(ignored, IGNORED_AT_CONSTRUCTION)
        super().__init__(config)
        if not input_is_parallel:
            raise ValueError("input_is_parallel must be true: inputs come sharded from a column-parallel layer")
        rank, size = tp_group.rank(), tp_group.size()
        self.layout = RowParallelCollectives(tp_group, config.sequence_parallel)
        self.weight_shard = column_shard((output_size, input_size), rank, size)
        self.bias_shard = unsharded((output_size,)) if bias else None
        self._allocate((output_size, input_size // size), output_size if bias else None)
        self.weight.tensor_model_parallel = size > 1  # type: ignore[attr-defined]
