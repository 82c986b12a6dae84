"""Bytes of memory per rank, by component, at the two moments of a step that take most of it.

    passes    parameters, masters, moments, codes, masks, gradients; saved activations, the loss's block, a workspace
    update    parameters, masters, moments, codes, masks, gradients; ZeRO's bucket, its share of gradients, Adam's copy

Parameters are fp32 and gradients are whole fp32 until the end of the step at every ZeRO stage: DeepSpeed's coalescing
reduces them after the last backward pass. Masters are a second fp32 copy of what a rank updates, under ZeRO-3 too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_sbn.plan import activations
from megatron_sbn.plan.activations import FP32
from megatron_sbn.plan.hardware import Keeps
from megatron_sbn.plan.shapes import Layout

BUCKET = 1 << 27  # elements of ZeRO's reduction bucket: parallel/zero/engine.py
BLOCK_BYTES = 192 * 2**20  # of the loss: layers/loss.py
_ALIGNMENT = 2  # elements, times the data-parallel size, to which DeepSpeed pads each group of parameters


@dataclass(frozen=True)
class RankMemory:
    """One rank of a pipeline stage; bytes by component. `host` is in the machine's memory instead (offload)."""

    stage: int
    lasting: Mapping[str, float]
    passes: Mapping[str, float]
    update: Mapping[str, float]
    host: Mapping[str, float]

    @property
    def total(self) -> float:
        """The most that the rank's device holds at once."""
        return sum(self.lasting.values()) + max(sum(self.passes.values()), sum(self.update.values()))


def rank_memory(layout: Layout, stage: int, keeps: Keeps) -> RankMemory:
    """What a rank of the stage holds."""
    parameters, share = _parameters(layout, stage)
    elements = sum(_groups(layout, stage, padded=False))
    states = {"masters": share * FP32, "moments": 2 * share * FP32}
    host = states if layout.recipe.optimizer.cpu_offload else {}
    device = {} if host else states
    bucket = min(BUCKET, elements) * FP32
    zero3 = layout.recipe.parallel.zero_stage == 3
    lasting = {"parameters": parameters * FP32} | device | prepared(layout, stage, keeps)
    lasting |= {"gradients": elements * FP32}
    if zero3:  # ZeRO-3 keeps its buffers for good
        lasting["ZeRO buffers"] = bucket + share * FP32
    passes = activations.saved(layout, stage, keeps) | workspace(layout, stage)
    update = {"ZeRO bucket": 0.0 if zero3 else bucket, "share of gradients, Adam's copy": 2 * share * FP32}
    if host:
        largest = max(one.weights for one in layout.linears())
        largest = max(largest, max(layout.matrices(stage)["embedding"], layout.matrices(stage)["head"])) * FP32
        host = host | {"ZeRO buffers": 2 * share * FP32 + largest}  # gradients, weights on their way, one gradient
        lasting["ZeRO buffers"] = lasting.get("ZeRO buffers", 0.0) + largest
        update["share of gradients, Adam's copy"] = share * FP32
    return RankMemory(stage, lasting, passes, update, host)


def worst_rank(layout: Layout, keeps: Keeps) -> RankMemory:
    """The stage whose ranks hold most, in the phase in which they do."""
    recipe = layout.recipe
    phases = [recipe.model_copy(update={"linear": linear}) for linear in recipe.linear.in_order()]
    layouts = [replace(layout, recipe=phase) for phase in phases]
    ranks = [rank_memory(one, stage, keeps) for one in layouts for stage in range(layout.pipeline)]
    return max(ranks, key=lambda rank: rank.total)


def _groups(layout: Layout, stage: int, padded: bool) -> tuple[int, int]:
    """Elements of this rank's parameters, (without experts, of experts); padded as ZeRO-1 and -2 pad them."""
    matrices, vectors = sum(layout.matrices(stage).values()), layout.vectors(stage)
    weights, biases = layout.experts(stage)
    unit, expert_unit = (_ALIGNMENT * layout.data, _ALIGNMENT * layout.expert_data) if padded else (1, 1)
    return (
        _pad(matrices, unit) + _pad(vectors, unit),
        _pad(weights, expert_unit) + _pad(biases, expert_unit),
    )


def _parameters(layout: Layout, stage: int) -> tuple[int, float]:
    """(elements of the parameters on this rank, elements that it updates)."""
    rest, experts = _groups(layout, stage, padded=True)
    share = rest / layout.data + (experts / layout.expert_data if experts else 0)
    if layout.recipe.parallel.zero_stage < 3:
        return rest + experts, share
    return round(share) + layout.vectors(stage), share  # vectors are whole as well


def _pad(elements: int, unit: int) -> int:
    return -(-elements // unit) * unit


def prepared(layout: Layout, stage: int, keeps: Keeps) -> dict[str, float]:
    """Codes, scales and masks of the Sparse-BitNet layers."""
    linear, weights = layout.recipe.linear, layout.weights_of_linears(stage)
    (n, m), ternary = linear.sparsity, linear.weight_format == "ternary"
    kept: dict[str, float] = {}
    if ternary:
        rows = sum(one.rows * one.count for one in layout.linears()) * layout.layers(stage)
        packed = packed_bytes(layout) if keeps.packed else 0.0
        kept["codes and scales"] = weights * (1 + keeps.transposed + packed) + rows * FP32
    outlives = linear.mask_interval > 1 or linear.mask_freeze_step is not None
    used = not ternary or linear.masked_gradient == "masked" or linear.sr_ste_decay > 0
    if n < m and (used or outlives):
        kept["masks"] = float(weights)
    if n < m and layout.recipe.training.telemetry_interval:
        kept["telemetry's masks"] = weights / 8
    return kept


def packed_bytes(layout: Layout) -> float:
    """Bytes a weight of the packed codes on CUDA: of the form by name; of the largest that `auto` may choose."""
    linear = layout.recipe.linear
    n, m = linear.sparsity
    compressed = 0.625  # half of the values and their places, as cuSPARSELt keeps them
    sizes = {"dense": 0.0, "wgmma": 0.0, "planes": 0.25, "cusparselt": compressed, "mma_sp": compressed}
    windows = 2 * (m - 2) / m  # columns that m becomes: m/2 - 1 windows of 4
    sizes |= {"sliding_cusparselt": windows * compressed, "sliding_mma_sp": windows * compressed}
    if linear.forward_form != "auto":
        return sizes[linear.forward_form]
    if linear.activation_bits is None or n == m:
        return sizes["planes"] if linear.activation_bits is not None else 0.0
    if is_two_four(n, m):
        return compressed
    return sizes["sliding_cusparselt"] if m % 2 == 0 and m >= 6 and n <= m - 2 else sizes["planes"]


def is_two_four(n: int, m: int) -> bool:
    """Whether N:M promises at most 2 non-zeros in each 4: what sparse tensor cores take.

    As `promises_two_four` of sbn_kernels, which loads torch; tests/plan/test_weight_forms.py compares them.
    """
    return (m % 4 == 0 and n <= 2) or (m, n) == (2, 1)


def workspace(layout: Layout, stage: int) -> dict[str, float]:
    """Estimates: what the widest layer's backward pass, and the loss, need for a moment. In no test."""
    w, t = layout.width, layout.tokens
    widest = max(layout.linears(), key=lambda one: one.rows + one.columns)
    tokens = t * (widest.rows + widest.columns) * w + t * max(widest.columns, widest.rows)
    needed = {"workspace": float(2 * tokens + widest.weights * (FP32 + w))}
    if layout.is_last(stage):
        copy = layout.vocabulary_weights()
        logits = t * (copy // layout.recipe.model.hidden_size) * (FP32 if w == FP32 else FP32 + w)
        forward = min(BLOCK_BYTES, logits) + (copy * w if w != FP32 else 0)
        needed["loss"] = float(max(forward, copy * FP32))  # backward scales the head's gradient in a new tensor
    return needed
