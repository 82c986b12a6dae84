"""Expected time of one optimizer step. Every rate is a ceiling of a data sheet times an assumed efficiency.

    step    = bubble * passes + loss + communication outside passes + update
    passes  = micro-batches * (GEMMs + attention + memory traffic + tensor- and expert-parallel communication)
    bubble  = 1 + (stages - 1) / (chunks * micro-batches)

of the slowest pipeline stage. Nothing overlaps with anything here: where layers do overlap collectives with GEMMs
(docs/architecture.md), a real step is faster.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sbn.plan import activations
from megatron_sbn.plan.activations import FP32, quantizes
from megatron_sbn.plan.comm_bytes import bytes_per_rank, forward_passes
from megatron_sbn.plan.flops import model_flops_per_token
from megatron_sbn.plan.hardware import Device, Efficiency
from megatron_sbn.plan.memory import is_two_four
from megatron_sbn.plan.shapes import Layout

# Bytes moved per element in the update: gradients read, masters and moments read and written, weights written.
_UPDATE_BYTES = 32
_PREPARE_BYTES = 9  # weights read twice, codes written
_ACCUMULATE_BYTES = 12  # a product's gradient added to the fp32 one: two reads, one write
_TOUCHES = 6  # reads and writes of what layers keep, in both passes, as a multiple of its bytes


@dataclass(frozen=True)
class Duration:
    """Seconds of one optimizer step by cause, of the slowest stage; tokens/s of all devices."""

    seconds: Mapping[str, float]
    tokens: int
    devices: int

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job."""
        return self.tokens / self.step


def duration(layout: Layout, device: Device, per_node: int, assumed: Efficiency) -> Duration:
    """Expected time of a step of the layout on `device`s, `per_node` of them in a node."""
    stages = [_stage(layout, stage, device, per_node, assumed) for stage in range(layout.pipeline)]
    slowest = max(stages, key=lambda seconds: sum(seconds.values()))
    training = layout.recipe.training
    tokens = training.global_batch_size * layout.recipe.model.seq_length
    return Duration(slowest, tokens, layout.world)


def _stage(layout: Layout, stage: int, device: Device, per_node: int, assumed: Efficiency) -> dict[str, float]:
    """Seconds by cause of a rank of the stage."""
    micro = layout.micro_batches
    bandwidth = device.bandwidth * assumed.bandwidth
    volume = bytes_per_rank(layout, stage)
    links = {group: link(layout, group, device, per_node) * assumed.link for group in volume}
    elements = sum(layout.matrices(stage).values()) + sum(layout.experts(stage))
    share = (sum(layout.matrices(stage).values()) / layout.data) + sum(layout.experts(stage)) / layout.expert_data
    kept = sum(activations.layer(layout, device.keeps).values()) * layout.layers(stage)
    passes = {
        "linear GEMMs": micro * _gemms(layout, stage, device, assumed),
        "attention": micro * _attention(layout, stage, device, assumed),
        "head and loss": micro * _head(layout, device, assumed) * layout.is_last(stage),
        "memory traffic of layers": micro * (_TOUCHES * kept + _ACCUMULATE_BYTES * elements) / bandwidth,
        "tensor and expert parallelism": sum(volume[g] / links[g] for g in ("tensor", "expert") if g in volume),
    }
    idle = (layout.pipeline - 1) / (layout.chunks * micro)
    update = share * _UPDATE_BYTES + layout.weights_of_linears(stage) * _PREPARE_BYTES
    return passes | {
        "pipeline bubble": idle * sum(passes.values()),
        "pipeline sends": volume["pipeline"] / links["pipeline"] if "pipeline" in volume else 0.0,
        "data parallelism": volume["data"] / links["data"] if "data" in volume else 0.0,
        "update and weight preparation": update / bandwidth,
    }


def _gemms(layout: Layout, stage: int, device: Device, assumed: Efficiency) -> float:
    """Linear layers of one micro-batch: forward (again where it is recomputed) at one rate, two GEMMs back."""
    linear = layout.recipe.linear
    floating = (device.bf16 if layout.recipe.model.bf16 else device.fp32) * assumed.floating_gemm
    int8 = device.int8 * assumed.int8_gemm
    if not quantizes(layout):
        rates = (floating, floating, floating)
    else:
        forward = device.sparse_int8 * assumed.int8_gemm if is_two_four(*linear.sparsity) else int8
        back = {"exact": (floating, floating), "int8_dgrad": (int8, floating), "int8": (int8, int8)}[linear.backward]
        rates = (forward, *back)
    operations = 2 * layout.tokens * _weights_passed(layout)
    forward, dx, dw = rates
    return layout.layers(stage) * operations * (forward_passes(layout) / forward + 1 / dx + 1 / dw)


def _weights_passed(layout: Layout) -> float:
    """Weights of a layer that each token of a micro-batch passes on this rank, on average."""
    linears = layout.linears()
    passed = float(sum(one.weights for one in linears[2:4]))
    if layout.local_experts:
        passed *= layout.recipe.model.moe_router_topk / (layout.tensor if layout.sequence else 1)
    return linears[0].weights + linears[1].weights + passed


def _attention(layout: Layout, stage: int, device: Device, assumed: Efficiency) -> float:
    """Scores and their sums over values: 2 matrix products forward, 5 back, of half the keys each."""
    model = layout.recipe.model
    width = model.num_attention_heads * model.head_dim / layout.tensor
    again = 1 if model.recompute_granularity is None else 2
    operations = 2 * layout.tokens * model.seq_length / 2 * width * (2 * again + 5)
    peak = device.bf16 if model.bf16 else device.fp32
    return layout.layers(stage) * operations / (peak * assumed.attention)


def _head(layout: Layout, device: Device, assumed: Efficiency) -> float:
    """Three GEMMs with the head, and its logits written and read twice in fp32."""
    rate = (device.bf16 if layout.recipe.model.bf16 else device.fp32) * assumed.floating_gemm
    weights = layout.vocabulary_weights()
    logits = layout.tokens * weights / layout.recipe.model.hidden_size * FP32
    return 6 * layout.tokens * weights / rate + 4 * logits / (device.bandwidth * assumed.bandwidth)


def link(layout: Layout, group: str, device: Device, per_node: int) -> float:
    """Bytes/s that a rank sends at within a group: the node's links where all its ranks are in one node.

    Ranks lie as [pipeline, data, tensor], neighbours in one tensor-parallel group; experts as [.., replica, expert].
    """
    stage = layout.tensor * layout.data
    span = {"tensor": layout.tensor, "expert": layout.expert, "data": stage, "pipeline": layout.world}[group]
    return device.node_link if span <= per_node and per_node % span == 0 else device.network


def operations(layout: Layout) -> dict[str, float]:
    """FLOPs by docs/metrics.md: dense-equivalent and sparse-effective, of a token and of a step."""
    dense, sparse = model_flops_per_token(layout.recipe)
    tokens = layout.recipe.training.global_batch_size * layout.recipe.model.seq_length
    return {"dense_token": dense, "sparse_token": sparse, "dense_step": dense * tokens, "sparse_step": sparse * tokens}
