"""Column- and row-parallel Sparse-BitNet linear layers, built and called as Megatron-Core builds and calls its own.

The arithmetic is functional.py's; what differs between one device and a shard is who talks to whom, and that is a
`TokenLayout`:

    column-parallel (rows of W cut)      forward: X_q and s_x all-gathered as int8 and fp32 (sequence parallelism)
                                         backward: the same, during the product for dX; then dX summed, or
                                         reduce-scattered over the tokens, during the product for dW
    row-parallel (columns of W cut)      forward: MAX of the tokens' magnitudes, exact SUM of the accumulators
                                         backward: dY all-gathered (sequence parallelism)

gamma, masks and codes are not made here: `TernaryState` makes those of all layers once per optimizer step and leaves
them in `prepared`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from torch import Tensor, nn

from megatron_sbn.functional import DIRECT, LinearSettings, PreparedWeight, apply_linear
from megatron_sbn.layers.loss import linear_cross_entropy
from megatron_sbn.layers.norm import RMSNorm
from megatron_sbn.parallel.shard import LogicalShard, column_shard, gated_shard, row_shard, whole
from megatron_sbn.producers import Direct, RmsNorm, fusible
from megatron_sbn.token_layout import Pending, TokenLayout
from megatron_sbn.weight_store import ResidentWeight

DENSE = LinearSettings(weight_format="dense", sparsity=(8, 8))
NOT_PREPARED = PreparedWeight()


class ColumnLayout(TokenLayout):
    """Every rank has all input features and some outputs; under sequence parallelism, some of the tokens."""

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
        self.group, self.sequence_parallel = group, sequence_parallel

    def gather_input(self, t: Tensor) -> Tensor:
        """[tokens/tp, ...] -> [tokens, ...] under sequence parallelism."""
        return _all_gather(t, self.group)() if self.sequence_parallel else t

    def start_gather_input(self, t: Tensor) -> Pending:
        """Begins `gather_input`."""
        return _all_gather(t, self.group, async_op=True) if self.sequence_parallel else lambda: t

    def reduce_grad_input(self, dx: Tensor) -> Tensor:
        """Sums the partial input gradients; under sequence parallelism each rank keeps its tokens."""
        return _reduce(dx, self.group, self.sequence_parallel)()

    def start_reduce_grad_input(self, dx: Tensor) -> Pending:
        """Begins `reduce_grad_input`."""
        return _reduce(dx, self.group, self.sequence_parallel, async_op=True)


class RowLayout(TokenLayout):
    """Every rank has some input features of all tokens; outputs are partial sums."""

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
        self.group, self.sequence_parallel = group, sequence_parallel
        self.splits_input = group.size() > 1

    def token_abs_max(self, a: Tensor) -> Tensor:
        """The maximum over the full input dimension, fp32 per token."""
        if self.group.size() > 1:
            a = a.clone()
            dist.all_reduce(a, dist.ReduceOp.MAX, group=self.group)
        return a

    def reduce_accumulator(self, acc: Tensor) -> Tensor:
        """Exact sum of integer accumulators; under sequence parallelism each rank keeps its tokens."""
        return _reduce(acc, self.group, self.sequence_parallel)()

    def local_tokens(self, s_x: Tensor) -> Tensor:
        """This rank's tokens of [tokens, ...] under sequence parallelism."""
        return s_x.chunk(self.group.size())[self.group.rank()] if self.sequence_parallel else s_x

    def gather_grad_output(self, dy: Tensor) -> Tensor:
        """[tokens/tp, ...] -> [tokens, ...] under sequence parallelism."""
        return _all_gather(dy, self.group)() if self.sequence_parallel else dy


class _Started:
    """A collective's result, for whoever calls this; what was given to it lives until then.

    On CUDA it is the current stream that waits, not this process.
    """

    def __init__(self, work: dist.Work | None, result: Tensor, given: Tensor) -> None:
        self._work, self._result, self._given = work, result, given

    def __call__(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        self._work, self._given = None, self._result
        return self._result


def _all_gather(t: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> Pending:
    """Concatenates along dim 0 over the group."""
    t = t.contiguous()
    gathered = t.new_empty((t.shape[0] * group.size(), *t.shape[1:]))
    return _Started(dist.all_gather_into_tensor(gathered, t, group=group, async_op=async_op), gathered, t)


def _reduce(t: Tensor, group: dist.ProcessGroup, scatter: bool, async_op: bool = False) -> Pending:
    """Sums over the group; with `scatter`, each rank keeps its share of dim 0."""
    if group.size() == 1:
        return lambda: t
    t = t.contiguous()
    if not scatter:
        return _Started(dist.all_reduce(t, group=group, async_op=async_op), t, t)
    share = t.new_empty((t.shape[0] // group.size(), *t.shape[1:]))
    return _Started(dist.reduce_scatter_tensor(share, t, group=group, async_op=async_op), share, t)


class SparseBitLinear(nn.Module):
    """What column- and row-parallel layers share: the parameters, and the prepared codes.

    Attributes:
        weight: latent weight, [out, in] of this rank, `config.params_dtype`.
        part_rows: rows (start, length) of every logical part of this rank's weight; part p has scale gamma_p.
        global_rows, global_columns: shape of the logical weight.
        settings, prepared: set by `TernaryState` before the first forward and after every optimizer step.
        leaves_bias: whether the caller adds the bias. Megatron-Core's `skip_bias_add` is not followed: the sum of a
            bf16 output and an fp32 bias is fp32, and so would be all that follows. Here it is added before the only
            rounding.
    """

    leaves_bias = False
    layout: TokenLayout
    weight_shard: LogicalShard
    bias_shard: LogicalShard | None

    def __init__(self, config: ModelParallelConfig) -> None:
        super().__init__()
        self.config = config
        self.settings = DENSE
        self.prepared = NOT_PREPARED
        self.narrow_input = False  # whether the 4-bit activation option applies (QKV and FC1 inputs)
        self.bias: nn.Parameter | None = None
        self._entrusted: ResidentWeight | None = None
        self._norm: tuple[RMSNorm, ...] = ()  # a tuple, so that the norm is no part of this module

    @property
    def fuses_producer(self) -> bool:
        """Whether what makes this layer's input is done by its own kernel, as things stand at this step."""
        return self.prepared.codes is not None and fusible(self.settings, self.prepared.codes.device)

    def absorb(self, norm: RMSNorm) -> None:
        """Lets this layer apply the norm before it, whose output nothing else reads, wherever one kernel does both."""
        self._norm = (norm,)
        norm.consumer = lambda: self.fuses_producer

    def _allocate(self, weight_shape: tuple[int, int], bias_size: int | None) -> None:
        device = torch.get_default_device() if not torch.cuda.is_available() else torch.cuda.current_device()
        make = {"dtype": self.config.params_dtype, "device": device}
        self.weight = nn.Parameter(torch.zeros(weight_shape, **make))
        if bias_size is not None:
            self.bias = nn.Parameter(torch.zeros(bias_size, **make))

    def entrust(self, store: ResidentWeight) -> None:
        """Leaves the weight to `store`, and takes it off the module's list: ZeRO-3 gathers what is on it for forward.

        The parameter itself stays where optimizer and checkpoints know it, and readable as `weight`.
        """
        weight = self._parameters.pop("weight")
        object.__setattr__(self, "weight", weight)
        self._entrusted = store

    @property
    def store(self) -> ResidentWeight:
        """The weight as its readers see it, whole or cut over data parallelism; its shape is the true one."""
        return self._entrusted or ResidentWeight(self.weight)

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
        self, x: Tensor, weight: Tensor | None = None, *, producer: Direct = DIRECT, **_: object
    ) -> tuple[Tensor, Tensor | None]:
        """[tokens, batch, in] -> ([tokens, batch, out], bias where the caller adds it, else None)."""
        own_bias = None if self.leaves_bias else self.bias
        used = self.store if weight is None else weight
        gain = None
        if self._norm and self.fuses_producer:
            producer, gain = RmsNorm(self._norm[0].eps), self._norm[0].weight
        y = apply_linear(x, used, own_bias, self.prepared, self.settings, self.layout, producer=producer, gain=gain)
        return y, self.bias if self.leaves_bias else None


class ColumnParallelLinear(SparseBitLinear):
    """Y = X W^T with the rows of W cut over the tensor-parallel group.

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
        **_: object,
    ) -> None:
        super().__init__(config)
        if gather_output:
            raise ValueError("gather_output is not supported: outputs stay cut over the tensor-parallel group")
        rank, size = tp_group.rank(), tp_group.size()
        self.sequence_parallel = config.sequence_parallel
        self.layout = ColumnLayout(tp_group, config.sequence_parallel)
        self.weight_shard = self._cut((output_size, input_size), rank, size)
        self.bias_shard = self._cut((output_size,), rank, size) if bias else None
        if skip_weight_param_allocation:
            self.register_parameter("weight", None)
            return
        self._allocate((output_size // size, input_size), output_size // size if bias else None)
        for parameter in self.parameters():
            parameter.tensor_model_parallel = size > 1  # type: ignore[attr-defined]

    def _cut(self, shape: tuple[int, ...], rank: int, size: int) -> LogicalShard:
        return row_shard(shape, rank, size)


class QkvLinear(ColumnParallelLinear):
    """Fused query, key and value projection; rows are interleaved per query group, `[q..q k v]`, as Megatron-Core's.

    Three logical parts, each with its own gamma. A rank holds whole query groups.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.narrow_input = True
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
        self.narrow_input = True

    @property
    def part_rows(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Rows of gate and up."""
        half = self.store.shape[0] // 2
        return (((0, half),), ((half, half),))

    def _cut(self, shape: tuple[int, ...], rank: int, size: int) -> LogicalShard:
        return gated_shard(shape, rank, size)


class RowParallelLinear(SparseBitLinear):
    """Y = X W^T with the columns of W cut over the tensor-parallel group.

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
        **_: object,
    ) -> None:
        super().__init__(config)
        if not input_is_parallel:
            raise ValueError("input_is_parallel must be true: inputs come cut from a column-parallel layer")
        rank, size = tp_group.rank(), tp_group.size()
        self.layout = RowLayout(tp_group, config.sequence_parallel)
        self.weight_shard = column_shard((output_size, input_size), rank, size)
        self.bias_shard = whole((output_size,)) if bias else None
        self._allocate((output_size, input_size // size), output_size if bias else None)
        self.weight.tensor_model_parallel = size > 1  # type: ignore[attr-defined]


class HeadLinear(ColumnParallelLinear):
    """The language-model head: column-parallel, always dense; a tied head is given the embedding's weight."""

    def forward(  # type: ignore[override]
        self, x: Tensor, weight: Tensor | None = None, *, labels: Tensor | None = None, **_: object
    ) -> tuple[Tensor, Tensor | None]:
        """(logits, None) of x [tokens, batch, hidden]; with labels [tokens, batch], (loss of every token, None)."""
        if labels is None:
            return super().forward(x, weight)
        used = self.weight if weight is None else weight
        assert isinstance(self.layout, ColumnLayout)
        losses = linear_cross_entropy(x, used, labels, group=self.layout.group, layout=self.layout)
        return losses.view(labels.shape), None
