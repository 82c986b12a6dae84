"""Bytes that one rank keeps between forward and backward, term by term; docs/plan.md has the table.

Symbols: t tokens of a micro-batch, u those of them that a rank has between linear layers (t / tensor under sequence
parallelism), w bytes of an activation; widths are this rank's.
"""

from collections import defaultdict

from megatron_sbn.plan.hardware import Keeps
from megatron_sbn.plan.shapes import Layout, Linear

FP32, INT64 = 4, 8
Bytes = dict[str, float]
"""By what is kept."""


def quantizes(layout: Layout) -> bool:
    """Whether linear layers keep int8 activations instead of their floating inputs."""
    linear = layout.recipe.linear
    return linear.weight_format == "ternary" and linear.activation_bits is not None


def fuses(layout: Layout, keeps: Keeps, narrow: bool) -> bool:
    """Whether the kernel that rounds a layer's tokens makes them, too; 4-bit (narrow) inputs are not."""
    bits = layout.recipe.linear.activation_bits
    return keeps.fused and quantizes(layout) and (bits == 8 or not narrow)


def layer(layout: Layout, keeps: Keeps) -> Bytes:
    """Of one transformer layer and micro-batch, without recomputation of the layer."""
    model = layout.recipe.model
    t, u, w = layout.tokens, layout.own_tokens, layout.width
    qkv, proj, *mlp = layout.linears()
    mixture = layout.local_experts > 0
    kept: Bytes = defaultdict(float)
    first = fuses(layout, keeps, narrow=True)
    kept["norms"] += norm(layout, keeps, first) + norm(layout, keeps, first and not mixture)
    kept["linear inputs"] += u * _token(layout, qkv.columns) + _attention_output(layout, t, proj)
    for name, value in _attention(layout, qkv, proj).items():
        kept[name] += value
    if mixture:
        tokens = u * model.moe_router_topk  # of all experts of a rank, on average
        kept["mlp"] += tokens * 4 * mlp[0].rows / 2 * w + tokens * mlp[1].columns * w  # scaled by the router, too
        kept["linear inputs"] += tokens * (_token(layout, mlp[0].columns) + _token(layout, mlp[1].columns))
        kept["router"] += u * model.hidden_size * FP32 + tokens * (INT64 + FP32)
        return dict(kept)
    gate_up, half = mlp[0].rows * w, mlp[1].columns * w
    # Unfused: silu(gate), and a copy of up that Megatron-Core makes when it adds its (zero) offset.
    kept["mlp"] += t * (gate_up if fuses(layout, keeps, narrow=False) else gate_up + 2 * half)
    kept["linear inputs"] += u * _token(layout, mlp[0].columns) + t * _token(layout, mlp[1].columns)
    return dict(kept)


def norm(layout: Layout, keeps: Keeps, fused: bool) -> float:
    """Of one norm: its input, in the activations' type where a kernel rounds its result; fp32 otherwise."""
    value = layout.width if fused else FP32 * keeps.norm_copies
    return float(layout.own_tokens * (layout.recipe.model.hidden_size * value + FP32))


def _token(layout: Layout, features: int) -> int:
    """Bytes of one token of a linear layer's input: int8 and a scale, or floating."""
    return features + FP32 if quantizes(layout) else features * layout.width


def _attention_output(layout: Layout, tokens: int, proj: Linear) -> float:
    """The output projection's input; floating, it is what attention keeps anyway."""
    return tokens * _token(layout, proj.columns) if quantizes(layout) else 0.0


def _attention(layout: Layout, qkv: Linear, proj: Linear) -> Bytes:
    """Queries and keys after rotation, the whole of QKV (values are a view of it), output, log-sums, cos and sin."""
    model, t, w = layout.recipe.model, layout.tokens, layout.width
    output = proj.columns
    keys = (qkv.rows - output) // 2
    heads = output // model.head_dim
    rotated = t * (output + keys) * w
    turns = 4 * model.seq_length * int(model.head_dim * model.rotary_percent) * w
    softmax = float(t * output * w + t * heads * FP32)
    if model.recompute_granularity == "selective":
        softmax = 0.0 if quantizes(layout) else t * output * w
    return {"attention": t * qkv.rows * w + rotated + turns + softmax}


def ends(layout: Layout, stage: int, keeps: Keeps) -> Bytes:
    """Of what comes before the first and after the last layer, for one micro-batch."""
    model, t = layout.recipe.model, layout.tokens
    kept: Bytes = defaultdict(float)
    if layout.is_first(stage):
        kept["loss and tokens"] += t * INT64
    if layout.is_last(stage):
        kept["norms"] += norm(layout, keeps, fused=False)
        gradients = t * model.hidden_size * layout.width + layout.vocabulary_weights() * FP32
        kept["loss and tokens"] += gradients + t * INT64
    return dict(kept)


def in_flight(layout: Layout, stage: int) -> tuple[int, int]:
    """(passes through a chunk, passes through the whole stage that are complete) held at once, by 1F1B's order."""
    total = layout.micro_batches * layout.chunks
    warm_up = layout.pipeline - stage - 1
    if layout.chunks > 1:
        warm_up = 2 * warm_up + (layout.chunks - 1) * layout.pipeline
    return min(total, warm_up + 1), layout.chunks


def saved(layout: Layout, stage: int, keeps: Keeps) -> Bytes:
    """The most that a rank of the stage keeps at once."""
    passes, chunks = in_flight(layout, stage)
    layers = layout.layers(stage)
    one, around = layer(layout, keeps), ends(layout, stage, keeps)
    if layout.recipe.model.recompute_granularity == "full":
        return _recomputed(layout, passes * layers / chunks, one, around, keeps)
    kept = {name: value * passes * layers / chunks for name, value in one.items()}
    for name, value in around.items():
        kept[name] = kept.get(name, 0.0) + value * (passes / chunks if layout.is_first(stage) else 1)
    return kept


def _recomputed(layout: Layout, inputs: float, one: Bytes, around: Bytes, keeps: Keeps) -> Bytes:
    """Inputs of all layers, and the larger of the loss (before backward) and one layer, made again (in it)."""
    hidden = layout.own_tokens * layout.recipe.model.hidden_size * layout.width
    kept = {"layer inputs": inputs * hidden}
    shared = hidden if layout.width == FP32 or fuses(layout, keeps, narrow=True) else 0.0  # the first norm's input
    again = dict(one)
    again["norms"] -= shared
    larger = around if sum(around.values()) > sum(again.values()) else again
    return kept | larger
