"""A mixture of experts under every way of spreading it over ranks: one model, one gradient, one update.

Compared with one rank and one AdamW on the gathered gradients: weights, scales and codes bit by bit, floating sums to
the rounding that their order allows.
"""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import cases
from ranks import run_ranks
from test_layouts import expected_codes, expected_gamma
from test_optimizer_step import norm_of
from test_resume import interrupted_and_not
from training_runs import Run, run_of, small_recipe, train_step, trainer_of

from megatron_sbn.checkpoint.directory import newest
from megatron_sbn.checkpoint.manifest import read_manifest
from megatron_sbn.doctor.logical_tensors import TensorShards, assemble, relative
from megatron_sbn.doctor.recorder import weight_shards
from megatron_sbn.errors import NumericalError
from megatron_sbn.layers.experts import average_expert_tokens
from megatron_sbn.parallel.shard import is_expert
from megatron_sbn.telemetry.mask_statistics import Telemetry
from megatron_sbn.telemetry.polarization import polarization
from megatron_sbn.training.schedule import learning_rate, weight_decay

EXPERTS = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=48", "model.num_layers=2")
EXPERT2, EXPERT4, ZERO2 = "parallel.expert=2", "parallel.expert=4", "parallel.zero_stage=2"
TENSOR2, PIPELINE2 = "parallel.tensor=2", "parallel.pipeline=2"
LAYOUTS = {
    "data2": (2, ()),
    "data2-expert2": (2, (EXPERT2,)),
    "data2-expert2-zero2": (2, (EXPERT2, ZERO2)),
    "data2-expert2-offload": (2, (EXPERT2, "optimizer.cpu_offload=true")),
    "tensor2": (2, (TENSOR2,)),
    "tensor2-expert2": (2, (TENSOR2, EXPERT2)),
    "pipeline2": (2, (PIPELINE2,)),
    "pipeline2-data2-expert2": (4, (PIPELINE2, EXPERT2)),
    "tensor2-data2-zero2": (4, (TENSOR2, ZERO2)),
    "tensor2-data2-expert2-zero2": (4, (TENSOR2, EXPERT2, ZERO2)),
    "tensor2-data2-expert4": (4, (TENSOR2, EXPERT4)),
}
QUICK = ("data2-expert2", "tensor2-expert2", "tensor2-data2-expert2-zero2")
each_layout = pytest.mark.parametrize("layout", cases(LAYOUTS, QUICK))
STEPS = 3
# A large rate, a warm-up, decay that changes every step and a norm that is clipped: each would show.
COMMON = ("optimizer.lr=1e-2", "optimizer.lr_warmup_steps=2", "optimizer.clip_grad=0.5", "training.steps=6")


def run(layout: str) -> Run:
    world_size, overrides = LAYOUTS[layout]
    return run_of(world_size, EXPERTS + COMMON + overrides, STEPS, STEPS)


def single() -> Run:
    return run_of(1, EXPERTS + COMMON, STEPS, STEPS)


@each_layout
def test_initial_weights_and_codes_are_equal_to_the_bit(layout: str) -> None:
    ours, theirs = run(layout), single()
    for mine, one in ((ours.weights(0), theirs.weights(0)), (ours.prepared(), theirs.prepared())):
        assert mine.keys() == one.keys()
        for name, tensor in mine.items():
            assert torch.equal(tensor, one[name]), name


@each_layout
def test_a_rank_holds_its_experts_alone_and_whole(layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    parallel = small_recipe(EXPERTS + overrides).parallel
    numbers = []
    for rank in run(layout).ranks:
        names = [name for name in rank.weights[0] if is_expert(name)]
        held = sorted({int(name.split("local_experts.")[1].split(".")[0]) for name in names})
        assert len(names) == 2 * len(held) * 2 // parallel.pipeline
        assert {tuple(rank.weights[0][name].value.shape) for name in names} == {(96, 64), (64, 48)}
        numbers.append(held)
    share = 4 // parallel.expert
    assert all(len(held) == share for held in numbers)
    assert sum(held.count(0) for held in numbers) == world_size // parallel.expert


def test_every_expert_has_scales_and_a_mask_of_its_own() -> None:
    weights, prepared = run("tensor2-expert2").weights(0), run("tensor2-expert2").prepared()
    layers = [name.removesuffix(".codes") for name in prepared if is_expert(name) and name.endswith(".codes")]
    assert len(layers) == 2 * 4 * 2
    for layer in layers:
        weight, gamma = weights[f"{layer}.weight"], prepared[f"{layer}.gamma"]
        np.testing.assert_allclose(gamma.double().numpy(), expected_gamma(layer, weight), rtol=1e-7)
        codes = prepared[f"{layer}.codes"]
        assert np.array_equal(codes.numpy(), expected_codes(weight.numpy(), gamma.numpy(), 6, 8)), layer
    gammas = {float(gamma) for layer in layers for gamma in prepared[f"{layer}.gamma"].unique()}
    assert len(gammas) == 2 * 4 * 3  # gate, up, down
    assert not any("router" in name for name in prepared)


@each_layout
def test_first_step_is_that_of_one_rank(layout: str) -> None:
    ours, theirs = run(layout), single()
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-6)
    assert ours.evaluation == pytest.approx(theirs.evaluation, rel=1e-6)
    assert relative(ours.hidden(), theirs.hidden()) < 1e-5
    gradients, expected = ours.gradients(0), theirs.gradients(0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert expected[name].abs().max() > 0
        assert relative(gradient, expected[name]) < 1e-5, name


@each_layout
def test_every_expert_counts_once_in_the_norm(layout: str) -> None:
    ours = run(layout)
    for step in range(STEPS):
        gradients = ours.gradients(step)
        assert ours.grad_norms[step] == pytest.approx(norm_of(gradients), rel=1e-6)
        # The experts are a part of it that would show if it were counted twice or not at all.
        experts = norm_of({name: gradient for name, gradient in gradients.items() if is_expert(name)})
        assert 1e-3 < experts / ours.grad_norms[step] < 0.999
    assert ours.grad_norms[0] == pytest.approx(single().grad_norms[0], rel=1e-5)


@pytest.mark.parametrize("layout", cases(["single", *LAYOUTS], ["single", *QUICK]))
def test_updates_are_those_of_one_adamw(layout: str) -> None:
    ours = single() if layout == "single" else run(layout)
    recipe = small_recipe(EXPERTS + COMMON)
    weights = {name: weight.clone().requires_grad_() for name, weight in ours.weights(0).items()}
    decay, rest = ([w for w in weights.values() if (w.dim() > 1) is matrix] for matrix in (True, False))
    adamw = torch.optim.AdamW([{"params": decay}, {"params": rest}], betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(STEPS):
        gradients = ours.gradients(step)
        assert norm_of(gradients) > recipe.optimizer.clip_grad
        for name, weight in weights.items():
            weight.grad = gradients[name] * (recipe.optimizer.clip_grad / (norm_of(gradients) + 1e-6))
        for group, decays in zip(adamw.param_groups, (True, False), strict=True):
            group["lr"] = learning_rate(recipe, step)
            group["weight_decay"] = weight_decay(recipe, step) if decays else 0.0
        adamw.step()
        for name, weight in ours.weights(step + 1).items():
            # Adam divides by the gradient's size: the order in which four replicas are summed shows where it is small.
            assert relative(weight, weights[name]) < (1e-6 if len(ours.ranks) < 4 else 1e-5), (step, name)
    moved = [float((ours.weights(STEPS)[name] - before).abs().max()) for name, before in ours.weights(0).items()]
    assert min(moved) > 1e-3


@pytest.mark.parametrize("layout", cases(["data2-expert2", "tensor2-expert2"], ["tensor2-expert2"]))
@pytest.mark.parametrize(
    "variant",
    [
        ("model.add_bias_linear=true",),
        ("model.moe_router_topk=1",),
        ("model.moe_aux_loss_coeff=0.1",),
        ("model.recompute_granularity=full",),
        ("linear.weight_format=dense", "linear.sparsity=8:8"),
        ("linear.masked_gradient=masked", "linear.activation_bits=4"),
    ],
    ids=lambda variant: variant[0],
)
def test_variants_have_the_gradients_of_one_rank(layout: str, variant: tuple[str, ...]) -> None:
    world_size, overrides = LAYOUTS[layout]
    ours, theirs = run_of(world_size, EXPERTS + overrides + variant), run_of(1, EXPERTS + variant)
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-6)
    assert ours.grad_norms[0] == pytest.approx(theirs.grad_norms[0], rel=1e-5)
    for name, gradient in theirs.gradients(0).items():
        assert gradient.abs().max() > 0
        assert relative(ours.gradients(0)[name], gradient) < 1e-5, name


def test_the_balancing_loss_reaches_the_router() -> None:
    router = "decoder.layers.0.mlp.router.weight"
    plain, balanced = run_of(1, EXPERTS), run_of(1, (*EXPERTS, "model.moe_aux_loss_coeff=0.1"))
    assert plain.losses == balanced.losses  # it is no part of the loss that is reported
    assert relative(balanced.gradients(0)[router], plain.gradients(0)[router]) > 1e-2


def test_bf16_activations() -> None:
    bf16 = (*EXPERTS, "model.bf16=true")
    ours, theirs = run_of(2, (*bf16, EXPERT2)), run_of(1, bf16)
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-5)
    assert ours.grad_norms[0] == pytest.approx(theirs.grad_norms[0], rel=5e-3)
    for name, gradient in theirs.gradients(0).items():
        assert gradient.dtype == torch.float32
        assert relative(ours.gradients(0)[name], gradient) < 5e-2, name


def test_training_with_experts_reduces_the_loss() -> None:
    losses = run_of(2, (*EXPERTS, EXPERT2, "optimizer.lr=2e-3"), 15, 0).losses
    assert losses[-1] < losses[0] - 0.1


def train_towards_two_experts(overrides: tuple[str, ...]) -> tuple[list[float], list[TensorShards]]:
    """A router that sends every token to the first two experts: the others have none."""
    with trainer_of(small_recipe((*EXPERTS, "model.add_bias_linear=true", *overrides))) as trainer:
        for logical in trainer.stages.parameters:
            if logical.name.endswith("router.bias"):
                logical.parameter.data.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
        before = weight_shards(trainer)
        result = train_step(trainer, 0)
        return [result.loss, result.grad_norm], [before, weight_shards(trainer)]


@pytest.mark.parametrize("layout", ["data2", "data2-expert2", "tensor2-expert2"])
def test_experts_without_tokens_do_not_learn(layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    # Without decay, an expert moves exactly when it has a gradient.
    fixed = ("optimizer.weight_decay=0",)
    ranks = run_ranks(train_towards_two_experts, world_size, overrides + fixed)
    before, after = (assemble([shards[moment] for _, shards in ranks]) for moment in (0, 1))
    one, (_, last) = run_ranks(train_towards_two_experts, 1, fixed)[0]
    for losses, _ in ranks:
        assert losses == pytest.approx(one, rel=1e-5)
    for name, weight in before.items():
        if is_expert(name):
            idle = name.split("local_experts.")[1][0] in "23"
            assert torch.equal(weight, after[name]) == idle, name
            assert torch.equal(last[name].value, weight) == idle, name


def measure(overrides: tuple[str, ...]) -> list[dict[str, float]]:
    with trainer_of(small_recipe((*EXPERTS, "optimizer.lr=3e-2", *overrides))) as trainer:
        telemetry = Telemetry(trainer.stages.state, trainer.parallel)
        values = [telemetry.measure(0)]
        train_step(trainer, 0)
        return [*values, telemetry.measure(1)]


@pytest.mark.parametrize("layout", cases(["data2-expert2", "tensor2", "tensor2-expert2", "pipeline2"], QUICK))
def test_telemetry_counts_every_expert_once(layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    (first, second), *others = run_ranks(measure, world_size, overrides)
    assert all(other == [first, second] for other in others)
    expected = run_ranks(measure, 1, ())[0]
    assert first == expected[0]
    assert second.keys() == expected[1].keys()
    assert second == pytest.approx(expected[1], rel=1e-2)


@pytest.mark.parametrize("layout", cases(["data2-expert2", "tensor2-data2-expert2-zero2", "pipeline2"], QUICK[:1]))
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(layout: str, tmp_path) -> None:
    world_size, overrides = LAYOUTS[layout]
    kept = ("linear.mask_interval=3",)
    ranks = run_ranks(interrupted_and_not, world_size, tmp_path, EXPERTS + overrides + kept, 2, 4)
    for rank in ranks:
        assert (rank["first"], rank["lost"], rank["drifted"], rank["losses"]) == (2, [], [], True)
    path = newest(tmp_path / "checkpoints")
    assert path is not None
    saved = [name for name in read_manifest(path).tensors if is_expert(name)]
    kinds = 1 + 2 + 2  # weight, moments, masks in force and of the last measurement
    assert len(saved) == 2 * 4 * 2 * kinds  # layers, experts, linears


def look(overrides: tuple[str, ...]) -> tuple[list[int], dict[str, list[np.ndarray]]]:
    """Sizes of what the ranks exchange to prepare all layers, and the histograms of this rank's first-layer FC2."""
    with trainer_of(small_recipe(EXPERTS + overrides)) as trainer:
        state, group = trainer.stages.state, trainer.parallel.tensor.group
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            state.prepare(1)
        sizes = [call.args[0].numel() for call in reduced.call_args_list]
        names = [name for name in state.layers if "layers.0" in name and name.endswith(("linear_fc2", "linear_proj"))]
        made = {name: polarization(state.layers[name], group, bins=12) for name in names}
    return sizes, {name: [one.weights, one.thresholds] for name, one in made.items()}


@pytest.mark.parametrize(("overrides", "exchanged"), [((TENSOR2, EXPERT2), [8, 8]), ((TENSOR2,), [8, 8])])
def test_scales_of_experts_need_no_exchange(overrides: tuple[str, ...], exchanged: list[int]) -> None:
    """q, k, v and the attention output of two layers: one MAX and one SUM of eight numbers."""
    (_, expected), *_ = run_ranks(look, 1, ())
    for sizes, histograms in run_ranks(look, 2, overrides):
        assert sizes == exchanged
        assert len(histograms) == 1 + 4 // (2 if EXPERT2 in overrides else 1)
        for name, (weights, thresholds) in histograms.items():
            assert np.array_equal(weights, expected[name][0]), name
            assert np.array_equal(thresholds, expected[name][1]), name


def test_forms_are_measured_for_the_tokens_of_an_expert() -> None:
    recipe = small_recipe((*EXPERTS, "model.moe_router_topk=3"))
    assert average_expert_tokens(recipe, 64) == 48
    assert average_expert_tokens(small_recipe((*EXPERTS, EXPERT2)), 64) == 64
    assert average_expert_tokens(small_recipe((*EXPERTS, TENSOR2)), 64) == 16
    assert average_expert_tokens(small_recipe(), 64) == 64


def poison(overrides: tuple[str, ...], rank: int) -> tuple[str, bool]:
    """(the error, whether all weights stayed) of a step in which one rank's experts have a gradient that is Inf."""
    with trainer_of(small_recipe(EXPERTS + overrides)) as trainer:
        finalize = trainer.stages.config.finalize_model_grads_func

        def poisoned(*args: object, **kwargs: object) -> None:
            finalize(*args, **kwargs)
            if trainer.parallel.rank == rank:
                next(p for p in trainer.stages.parameters if p.is_expert).parameter.grad[0, 0] = torch.inf

        trainer.stages.config.finalize_model_grads_func = poisoned
        before = weight_shards(trainer)
        with pytest.raises(NumericalError) as error:
            train_step(trainer, 0)
        after = weight_shards(trainer)
        return str(error.value), all(torch.equal(before[name].value, after[name].value) for name in before)


def test_an_expert_with_infinite_gradients_stops_every_rank_before_the_update() -> None:
    for message, stayed in run_ranks(poison, 2, (EXPERT2,), 1):
        assert message.startswith("step 1: gradient norm is inf")
        assert stayed
