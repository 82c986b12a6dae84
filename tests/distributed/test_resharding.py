"""A checkpoint of any layout opens at any other: the same bits in every tensor, the same next step.

State is compared as DeepSpeed's own functions give it, put together to logical tensors over the ranks; codes and masks
likewise. fp32 hidden states of ternary models are the same bits at every layout, the loss after the head's float
product agrees to 1e-5.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import cases
from ranks import run_ranks
from saving import FAST, Run, whole_state
from torch import Tensor
from training_runs import small_recipe, trainer_of

from megatron_sbn.doctor.logical_tensors import TensorShard, TensorShards, assemble
from megatron_sbn.doctor.recorder import recorded_hidden_states
from megatron_sbn.doctor.tiny_recipe import batch_of
from megatron_sbn.training.step import Trainer

TENSOR2, TENSOR4, PIPELINE2 = "parallel.tensor=2", "parallel.tensor=4", "parallel.pipeline=2"
ZERO2, ZERO3, VIRTUAL2 = "parallel.zero_stage=2", "parallel.zero_stage=3", "parallel.virtual_pipeline=2"
EXPERT2 = "parallel.expert=2"
# Saved between two updates of its masks, so masks in force and masks of the last measurement both travel.
BASE = (*FAST, "linear.mask_interval=3", "linear.sparsity=2:4", "training.micro_batch_size=1")
TIED = "model.share_embeddings_and_output_weights=true"
EXPERTS = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=48", "model.num_layers=2")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "tensor2-pipeline2-zero1": (4, (TENSOR2, PIPELINE2)),
    "data2-zero2": (2, (ZERO2,)),
    "tensor4": (4, (TENSOR4,)),
    "tensor2-data2-zero3": (4, (TENSOR2, ZERO3)),
    "pipeline2-virtual2-data2": (4, (PIPELINE2, VIRTUAL2)),
    "data4-zero1": (4, ()),
}
EXPERT_LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "expert2": (2, (EXPERT2,)),
    "tensor2-pipeline2": (4, (TENSOR2, PIPELINE2)),
    "tensor2-expert2-data2-zero2": (4, (TENSOR2, EXPERT2, ZERO2)),
}
AT = 4


class Seen(NamedTuple):
    """What one rank saw: its state, and what an evaluation and a step make of it."""

    state: TensorShards
    hidden: TensorShards
    evaluation: float
    loss: float
    grad_norm: float
    counters: object
    updates: int


def save_and_look(folder: Path, overrides: tuple[str, ...]) -> Seen:
    with trainer_of(small_recipe((*BASE, *overrides))) as trainer:
        run = Run(trainer, folder)
        run.train(0, AT)
        run.save(AT)
        return look(run)


def resume_and_look(folder: Path, overrides: tuple[str, ...]) -> Seen:
    with trainer_of(small_recipe((*BASE, *overrides))) as trainer:
        run = Run(trainer, folder)
        assert run.restore() == AT
        return look(run)


def look(run: Run) -> Seen:
    trainer = run.trainer
    state = whole_state(trainer)
    for name, layer in trainer.stages.state.layers.items():
        state[f"codes.{name}"] = TensorShard(layer.weight_shard, layer.prepared.codes.clone())
    for kind, masks in (("kept", trainer.stages.state.kept_masks()), ("measured", run.telemetry.references())):
        for name, mask in masks.items():
            state[f"{kind}.{name}"] = TensorShard(trainer.stages.state.layers[name].weight_shard, mask.clone())
    counters, updates = run.telemetry.counters(), trainer.zero.updates
    hidden, evaluation = evaluate(trainer)
    result = trainer.step(AT, batch_of(trainer.recipe, AT)[trainer.rows()])
    return Seen(state, hidden, evaluation, result.loss, result.grad_norm, counters, updates)


def evaluate(trainer: Trainer) -> tuple[TensorShards, float]:
    samples = batch_of(trainer.recipe, AT)[trainer.rows()]
    with recorded_hidden_states(trainer) as hidden:
        loss = trainer.evaluate(samples)
    return hidden, loss


def logical(ranks: list[Seen]) -> dict[str, Tensor]:
    return assemble([rank.state for rank in ranks])


def check_same(saved: list[Seen], resumed: list[Seen], ternary_bits: bool = True) -> None:
    before, after = logical(saved), logical(resumed)
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    assert {rank.counters for rank in saved} == {rank.counters for rank in resumed}
    assert {rank.updates for rank in resumed} == {AT}
    for name in ("evaluation", "loss", "grad_norm"):
        assert getattr(resumed[0], name) == pytest.approx(getattr(saved[0], name), rel=1e-5), name
    if ternary_bits:
        a, b = assemble([rank.hidden for rank in saved]), assemble([rank.hidden for rank in resumed])
        assert a.keys() == b.keys() != set()
        assert all(torch.equal(a[name], b[name]) for name in a)


# The quick one is resumed at tensor4 and at interleaved stages; experts and tied embeddings, below, at the other kinds.
@pytest.mark.parametrize("source", cases(LAYOUTS, ["data2-zero2"]))
def test_any_layout_opens_at_any_other(source: str, tmp_path: Path) -> None:
    """Every layout once as the source, resumed at two or all others."""
    world_size, overrides = LAYOUTS[source]
    saved = run_ranks(save_and_look, world_size, tmp_path, overrides)
    names = list(LAYOUTS)
    start = names.index(source)
    everywhere = source in ("tensor2-pipeline2-zero1", "data4-zero1")
    targets = names if everywhere else [names[(start + offset) % len(names)] for offset in (1, 3)]
    for target in targets:
        world_size, overrides = LAYOUTS[target]
        check_same(saved, run_ranks(resume_and_look, world_size, tmp_path, overrides))


@pytest.mark.parametrize("source", cases(EXPERT_LAYOUTS, ["expert2"]))
def test_experts_open_at_any_layout(source: str, tmp_path: Path) -> None:
    """Experts are whole on a rank, their replicas are other ranks: names bring them where they belong."""
    world_size, overrides = EXPERT_LAYOUTS[source]
    saved = run_ranks(save_and_look, world_size, tmp_path, (*EXPERTS, *overrides))
    for target, (world_size, overrides) in EXPERT_LAYOUTS.items():
        if target != source:
            resumed = run_ranks(resume_and_look, world_size, tmp_path, (*EXPERTS, *overrides))
            check_same(saved, resumed, ternary_bits=False)  # the router's products are floating


def test_a_tied_embedding_is_saved_once_and_comes_back_to_both_stages(tmp_path: Path) -> None:
    saved = run_ranks(save_and_look, 2, tmp_path, (TIED, PIPELINE2))
    check_same(saved, run_ranks(resume_and_look, 2, tmp_path, (TIED, ZERO3)))
    check_same(saved, run_ranks(resume_and_look, 4, tmp_path, (TIED, PIPELINE2, TENSOR2)))


@pytest.mark.slow
def test_biases_that_all_tensor_parallel_ranks_hold(tmp_path: Path) -> None:
    """Dense too: floating products, so hidden states agree to rounding only."""
    overrides = ("model.add_bias_linear=true", "linear.weight_format=dense")
    saved = run_ranks(save_dense, 2, tmp_path, (*overrides, TENSOR2))
    for world_size, layout in ((1, ()), (2, (ZERO3,)), (4, (TENSOR2, PIPELINE2))):
        after = run_ranks(resume_dense, world_size, tmp_path, (*overrides, *layout))
        before, now = assemble(saved), assemble(after)
        assert before.keys() == now.keys()
        assert [name for name, tensor in before.items() if not torch.equal(tensor, now[name])] == []


def save_dense(folder: Path, overrides: tuple[str, ...]) -> TensorShards:
    with trainer_of(small_recipe((*BASE, *overrides))) as trainer:
        run = Run(trainer, folder)
        run.train(0, 2)
        run.save(2)
        return whole_state(trainer)


def resume_dense(folder: Path, overrides: tuple[str, ...]) -> TensorShards:
    with trainer_of(small_recipe((*BASE, *overrides))) as trainer:
        assert Run(trainer, folder).restore() == 2
        return whole_state(trainer)
