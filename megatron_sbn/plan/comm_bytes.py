"""Communication volume of a rank in one optimizer step, in bytes by group, from shapes; defined in docs/metrics.md.

    all-reduce 2 (n - 1)/n S    all-gather (n - 1) own S    reduce-scatter (n - 1)/n S    reduce S, root 0    send S

The metrics `bytes_tensor`, `bytes_pipeline`, `bytes_data` and `bytes_expert` are sums of these over all ranks. What
experts exchange depends on no token with Megatron-Core's all-gathering dispatcher; a load-balancing loss adds some
bytes that are not here.
"""

from collections import defaultdict

from megatron_sbn.plan.activations import FP32, INT64, quantizes
from megatron_sbn.plan.shapes import Layout

GROUPS = ("tensor", "pipeline", "data", "expert")


def bytes_per_rank(layout: Layout, stage: int) -> dict[str, float]:
    """Bytes by group of one rank of a pipeline stage, the mean over the ranks of the stage."""
    sizes = dict(zip(GROUPS, (layout.tensor, layout.pipeline, layout.data, layout.expert), strict=True))
    made = {
        "tensor": _tensor(layout, stage),
        "pipeline": _pipeline(layout, stage),
        "data": _data(layout, stage),
        "expert": _expert(layout, stage),
    }
    return {group: total for group, total in made.items() if sizes[group] > 1}


def bytes_of_all_ranks(layout: Layout) -> dict[str, float]:
    """Bytes by group over all ranks: the metrics bytes_GROUP."""
    total: dict[str, float] = defaultdict(float)
    for stage in range(layout.pipeline):
        for group, volume in bytes_per_rank(layout, stage).items():
            total[group] += volume * layout.tensor * layout.data
    return dict(total)


def _all_reduce(size: float, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * size


def _scatter(size: float, ranks: int) -> float:
    """A reduce-scatter of `size` bytes, or an all-gather to `size` bytes."""
    return (ranks - 1) / ranks * size


def forward_passes(layout: Layout) -> int:
    """How often a layer's forward pass runs for a micro-batch."""
    return 2 if layout.recipe.model.recompute_granularity == "full" else 1


def _tensor(layout: Layout, stage: int) -> float:
    """Layers, loss, sums of norm gradients, scales."""
    model, ranks, t, w = layout.recipe.model, layout.tensor, layout.tokens, layout.width
    hidden, sequence = model.hidden_size, layout.sequence
    layers, again = layout.layers(stage), forward_passes(layout)
    pairs = layers * (1 if layout.local_experts else 2)  # of a column- and a row-parallel layer

    def reduced(size: float) -> float:
        return _scatter(size, ranks) if sequence else _all_reduce(size, ranks)

    forward = reduced(t * hidden * FP32)  # accumulators of a row-parallel layer
    backward = reduced(t * hidden * w)  # gradients of a column-parallel layer's input
    if quantizes(layout):
        forward += _all_reduce(t * FP32, ranks)  # magnitudes of the row-parallel layer's tokens
    if sequence:
        token = hidden + FP32 if quantizes(layout) else hidden * w
        forward += _scatter(t * token, ranks)
        backward += _scatter(t * (token + hidden * w), ranks)
    one = pairs * (again * forward + backward)
    if layout.is_first(stage):
        one += reduced(t * hidden * FP32) + (_scatter(t * hidden * FP32, ranks) if sequence else 0.0)
    if layout.is_last(stage):
        one += reduced(t * hidden * w) + _all_reduce(3 * t * FP32, ranks)
        one += _scatter(t * hidden * w, ranks) if sequence else 0.0
    total = layout.micro_batches * one
    if sequence:
        total += _all_reduce(_of_own_tokens(layout, stage) * FP32, ranks)
    if layout.recipe.parallel.zero_stage < 3:
        total += _all_reduce(_sharded_parts(layout, stage) * (FP32 + INT64), ranks)
    return total


def _of_own_tokens(layout: Layout, stage: int) -> int:
    """Elements whose gradients cover a rank's own tokens only: norms and routers."""
    model = layout.recipe.model
    routers = (model.num_moe_experts or 0) * (model.hidden_size + model.add_bias_linear)
    return layout.layers(stage) * (2 * model.hidden_size + routers) + model.hidden_size * layout.is_last(stage)


def _sharded_parts(layout: Layout, stage: int) -> int:
    """Scales that several ranks make together."""
    if layout.recipe.linear.weight_format != "ternary":
        return 0
    everything = layout.recipe.parallel.zero_stage == 3  # every weight is sharded over data parallelism
    return layout.layers(stage) * sum(one.parts * one.count for one in layout.linears() if one.sharded or everything)


def _pipeline(layout: Layout, stage: int) -> float:
    """Hidden states forward, their gradients back, the embedding's gradient if it is the head too, the loss."""
    state = layout.own_tokens * layout.recipe.model.hidden_size * layout.width
    forward = layout.chunks - layout.is_last(stage)
    back = layout.chunks - layout.is_first(stage)
    total = layout.micro_batches * (forward + back) * state + _all_reduce(INT64, layout.pipeline)
    if layout.is_tied and (layout.is_first(stage) or layout.is_last(stage)):
        total += _all_reduce(layout.vocabulary_weights() * FP32, 2)
    return total


def _data(layout: Layout, stage: int) -> float:
    """Gradients to the replica that updates them, weights back; two scalars for loss and norm."""
    ranks = layout.data
    matrices, vectors = layout.matrices(stage), layout.vectors(stage)
    elements = sum(matrices.values()) + vectors
    scalars = _all_reduce(INT64 + 2 * FP32, ranks)
    if layout.recipe.parallel.zero_stage == 3:
        return _zero3(layout, matrices, vectors, ranks) + scalars
    total = scalars + 2 * _scatter(elements * FP32, ranks)
    if layout.expert_data > 1:
        total += 2 * _scatter(sum(layout.experts(stage)) * FP32, layout.expert_data)
    return total


def _zero3(layout: Layout, matrices: dict[str, int], vectors: int, ranks: int) -> float:
    """ZeRO-3, one pipeline stage: gradients scattered once; weights gathered as often as they are read."""
    micro, linear = layout.micro_batches, layout.recipe.linear
    again = forward_passes(layout)
    n, m = linear.sparsity
    # From their codes, ternary layers compute without their weights; masks of dense ones need them once as well.
    once = 1 if linear.weight_format == "ternary" or n < m else 0
    times = once if linear.weight_format == "ternary" else once + (1 + again) * micro
    ends = matrices["embedding"] + matrices["head"]
    gathered = matrices["linears"] * times + ends * (3 * micro + 1) / 2 + vectors * 2 * micro
    holders = layout.tensor * layout.data
    scales = _all_reduce(_sharded_parts(layout, 0) * (FP32 + INT64), holders)
    gradients = sum(matrices.values()) + vectors
    return _scatter((gathered + gradients) * FP32, ranks) + scales


def _expert(layout: Layout, stage: int) -> float:
    """Tokens, routes and weights of all ranks of an expert-parallel group; their results in fp32; the same back."""
    model, ranks = layout.recipe.model, layout.expert
    if ranks == 1:
        return 0.0
    tokens = ranks * layout.own_tokens
    experts, hidden, w = model.num_moe_experts or 0, model.hidden_size, layout.width
    forward = tokens * (experts * (1 + FP32) + hidden * w + hidden * FP32)
    backward = tokens * (experts * FP32 + hidden * w + hidden * FP32)
    one = forward_passes(layout) * _scatter(forward, ranks) + _scatter(backward, ranks)
    return layout.micro_batches * layout.layers(stage) * one
