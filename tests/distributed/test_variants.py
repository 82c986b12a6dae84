"""Every setting of `linear` and `model` trains, means what it says, and does not depend on the layout."""

import numpy as np
import pytest
import torch
from training_runs import batch_of, run_of, run_ranks, small_recipe, train_step, trainer_of

from megatron_sbn.doctor.logical_tensors import relative
from megatron_sbn.doctor.recorder import prepared_shards, weight_shards
from megatron_sbn.layers.weight_quantizer import settings_at

TENSOR2, TENSOR4, PIPELINE2 = "parallel.tensor=2", "parallel.tensor=4", "parallel.pipeline=2"
DENSE = "linear.weight_format=dense"
LAYERS = 2
SHALLOW = f"model.num_layers={LAYERS}"
EXACT = 1e-5  # relative error of gradients where only the order of fp32 sums differs
ROUNDED = 0.03  # dY rounded to int8 by the maximum of the local rows: 0.015 was seen
VARIANTS = {
    "ternary-4of8": (("linear.sparsity=4:8",), EXACT),
    "ternary-dense-mask": (("linear.sparsity=8:8",), EXACT),
    "sparse-dense": ((DENSE, "linear.sparsity=6:8"), EXACT),
    "dense": ((DENSE, "linear.sparsity=8:8"), EXACT),
    "float-activations": (("linear.activation_bits=none",), EXACT),
    "4-bit-activations": (("linear.activation_bits=4",), EXACT),
    "mask-then-quant": (("linear.order=mask_then_quant",), EXACT),
    "mask-of-codes": (("linear.mask_source=quantized",), EXACT),
    "masked-gradient": (("linear.masked_gradient=masked",), EXACT),
    "sparse-dense-masked-gradient": ((DENSE, "linear.masked_gradient=masked"), EXACT),
    "sr-ste": (("linear.sr_ste_decay=0.1",), EXACT),
    "int8-dgrad": (("linear.backward=int8_dgrad",), ROUNDED),
    "int8": (("linear.backward=int8",), ROUNDED),
    "biases": (("model.add_bias_linear=true", "model.add_qkv_bias=true"), EXACT),
    "one-key-per-head": (("model.num_query_groups=8",), EXACT),
    "wide-heads": (("model.kv_channels=16",), EXACT),
    "tied": (("model.share_embeddings_and_output_weights=true",), EXACT),
    "interleaved-rotary": (("model.rotary_interleaved=true", "model.rotary_percent=0.5"), EXACT),
}
FLOATING = ("sparse-dense", "dense", "float-activations", "sparse-dense-masked-gradient")
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@each_variant
def test_first_step_does_not_depend_on_the_layout(variant: str) -> None:
    overrides, tolerance = VARIANTS[variant]
    single, cut = run_of(1, (SHALLOW, *overrides), 2, 1), run_of(2, (SHALLOW, TENSOR2, *overrides), 2, 1)
    if variant not in FLOATING:
        assert torch.equal(cut.hidden(), single.hidden())
    assert relative(cut.hidden(), single.hidden()) < 1e-5
    assert cut.losses[0] == pytest.approx(single.losses[0], rel=1e-6)
    assert cut.evaluation == pytest.approx(single.evaluation, rel=1e-6)
    assert cut.losses[1] == pytest.approx(single.losses[1], abs=1e-3)
    assert cut.grad_norms[0] == pytest.approx(single.grad_norms[0], rel=tolerance)
    theirs = single.gradients(0)
    for name, gradient in cut.gradients(0).items():
        assert relative(gradient, theirs[name]) < tolerance, name
    for name, tensor in cut.prepared().items():
        assert torch.equal(tensor, single.prepared()[name]), name


def test_variants_are_all_different() -> None:
    """A setting that is ignored would give another variant's loss or gradient norm."""
    first = [run_of(1, (SHALLOW, *overrides), 2, 1) for overrides, _ in VARIANTS.values()]
    base = run_of(1, (SHALLOW,), 2, 1)
    seen = {(run.losses[0], run.grad_norms[0]) for run in (*first, base)}
    assert len(seen) == len(VARIANTS) + 1


@pytest.mark.parametrize("variant", ["masked-gradient", "sparse-dense-masked-gradient"])
def test_a_masked_gradient_is_the_dense_one_times_the_mask(variant: str) -> None:
    overrides, _ = VARIANTS[variant]
    masked = run_of(1, (SHALLOW, *overrides), 2, 1)
    dense = run_of(1, (SHALLOW, *(o for o in overrides if "masked_gradient" not in o)), 2, 1)
    masks = {name: mask for name, mask in masked.prepared().items() if name.endswith(".mask")}
    assert len(masks) == 4 * LAYERS
    for name, mask in masks.items():
        assert float(mask.float().mean()) == 0.75
        weight = name.replace(".mask", ".weight")
        assert torch.equal(masked.gradients(0)[weight], dense.gradients(0)[weight] * mask)


def test_sr_ste_adds_its_decay_once_a_step() -> None:
    """dW + decay * (1 - mask) * W, whatever the number of micro-batches."""
    plain, decayed = run_of(1, (SHALLOW,), 2, 1), run_of(1, (SHALLOW, *VARIANTS["sr-ste"][0]), 2, 1)
    masks = decayed.prepared()
    for name, gradient in decayed.gradients(0).items():
        mask = masks.get(name.replace(".weight", ".mask"))
        extra = 0 if mask is None else 0.1 * ~mask * decayed.weights(0)[name]
        assert relative(gradient, plain.gradients(0)[name] + extra) < 1e-6


def test_biases_learn() -> None:
    run = run_of(2, (SHALLOW, TENSOR2, *VARIANTS["biases"][0]), 2, 1)
    biases = [name for name in run.weights(0) if name.endswith(".bias")]
    assert len(biases) == 4 * LAYERS
    for name in biases:
        assert not run.weights(0)[name].any()
        assert run.weights(1)[name].abs().min() > 0


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("layout", [(1, ()), (4, (TENSOR2, PIPELINE2))], ids=["single", "tensor2-pipeline2"])
def test_recomputation_changes_no_bit_and_prepares_nothing(
    layout: tuple[int, tuple[str, ...]], granularity: str
) -> None:
    world_size, overrides = layout
    recomputed = run_of(world_size, (*overrides, f"model.recompute_granularity={granularity}"), 2, 1)
    kept = run_of(world_size, overrides, 2, 1)
    assert recomputed.losses == kept.losses
    assert recomputed.grad_norms == kept.grad_norms
    for name, gradient in recomputed.gradients(0).items():
        assert torch.equal(gradient, kept.gradients(0)[name]), name
    assert [rank.preparations for rank in recomputed.ranks] == [3] * world_size  # at the start, and after 2 steps


def test_evaluation_and_micro_batches_prepare_nothing() -> None:
    run = run_of(1, ("training.micro_batch_size=1",), 2, 1)
    assert run.ranks[0].preparations == 3


PHASES = (
    "linear.weight_format=dense",
    "linear.sparsity=8:8",
    "linear.phases=[{step: 1, sparsity: 6:8}, {step: 2, weight_format: ternary, activation_bits: none}, "
    "{step: 3, sparsity: 4:8, activation_bits: 4}]",
)


def phases() -> list[tuple[object, ...]]:
    recipe = small_recipe(PHASES)
    seen: list[tuple[object, ...]] = []
    with trainer_of(recipe) as trainer:
        for step in range(4):
            layers = trainer.stages.state.layers
            qkv = layers["decoder.layers.0.self_attention.linear_qkv"]
            down = layers["decoder.layers.0.mlp.linear_fc2"]
            kept = qkv.prepared.codes if qkv.prepared.codes is not None else qkv.prepared.mask
            most = None if kept is None else int((kept != 0).unflatten(1, (-1, 8)).sum(-1).max())
            formats = (qkv.settings.weight_format, qkv.settings.activation_bits, down.settings.activation_bits)
            seen.append((*formats, most, train_step(trainer, step).loss))
    return seen


def test_phases_begin_at_their_steps() -> None:
    seen = run_ranks(phases, 1)[0]
    assert [row[:4] for row in seen] == [
        ("dense", 8, 8, None),
        ("dense", 8, 8, 6),
        ("ternary", None, None, 6),
        ("ternary", 4, 8, 4),
    ]
    assert np.isfinite([row[4] for row in seen]).all()


def masks_and_weights(overrides: tuple[str, ...], steps: int) -> list[tuple[bool, float]]:
    """Before every step: whether the mask is that of the weights as they are, and the share of its bits that moved."""
    recipe = small_recipe(("optimizer.lr=3e-2", "optimizer.min_lr=1e-2", *overrides))
    seen = []
    with trainer_of(recipe) as trainer:
        state = trainer.stages.state
        before = None
        for step in range(steps):
            mask = prepared_shards(trainer.stages)["decoder.layers.1.mlp.linear_fc1.mask"].value
            weight = weight_shards(trainer)["decoder.layers.1.mlp.linear_fc1.weight"].value
            threshold = weight.abs().unflatten(1, (-1, 8)).kthvalue(3, dim=-1).values  # the smallest of 6 kept
            fresh = torch.equal(mask, (weight.abs().unflatten(1, (-1, 8)) >= threshold.unsqueeze(-1)).flatten(1))
            moved = 0.0 if before is None else float((mask ^ before).float().mean())
            seen.append((fresh, moved))
            assert state.preparations == step + 1
            before = mask
            train_step(trainer, step)
    return seen


@pytest.mark.parametrize("form", [(), (DENSE,)], ids=["ternary", "dense"])
@pytest.mark.parametrize(
    ("overrides", "fresh"),
    [
        (("linear.mask_interval=3",), [True, False, False, True, False, False, True]),
        (("linear.mask_freeze_step=2",), [True, True, True, False, False, False, False]),
        (("linear.mask_interval=2", "linear.mask_freeze_step=3"), [True, False, True, False, False, False, False]),
    ],
    ids=["interval", "freeze", "both"],
)
def test_masks_stay_between_updates(overrides: tuple[str, ...], fresh: list[bool], form: tuple[str, ...]) -> None:
    seen = run_ranks(masks_and_weights, 1, (*form, *overrides), len(fresh))[0]
    assert [row[0] for row in seen] == fresh
    for is_fresh, moved in seen[1:]:
        assert (moved > 0) == is_fresh


def mask_round_trips(overrides: tuple[str, ...], steps: tuple[int, ...]) -> list[tuple[int, bool]]:
    return [mask_round_trip(overrides, done) for done in steps]


def mask_round_trip(overrides: tuple[str, ...], done: int) -> tuple[int, bool]:
    """Trains `done` steps; a second trainer that is given weights and masks must prepare the same codes."""
    recipe = small_recipe(("optimizer.lr=3e-2", "optimizer.min_lr=1e-2", *overrides))
    with trainer_of(recipe) as trainer:
        for step in range(done):
            train_step(trainer, step)
        weights, expected = weight_shards(trainer), prepared_shards(trainer.stages)
        masks = {name: mask.clone() for name, mask in trainer.stages.state.kept_masks().items()}
    with trainer_of(recipe) as other:
        for logical in other.stages.parameters:
            logical.parameter.data.copy_(weights[logical.name].value)
        other.stages.state.load_masks(masks, trainer.stages.state.mask_sparsity)
        other.stages.state.prepare(done)
        ours = prepared_shards(other.stages)
    return len(masks), all(torch.equal(ours[name].value, part.value) for name, part in expected.items())


@pytest.mark.parametrize(
    ("overrides", "saved"),
    [
        ((), 0),
        (("linear.mask_interval=4",), 16),
        (("linear.mask_freeze_step=1",), 16),
        (("linear.mask_interval=4", DENSE), 16),
        (("linear.mask_interval=4", "linear.phases=[{step: 2, sparsity: 4:8}]"), 16),
        (("linear.mask_interval=4", "linear.sparsity=8:8"), 0),
    ],
    ids=str,
)
def test_masks_survive_a_checkpoint(overrides: tuple[str, ...], saved: int) -> None:
    assert run_ranks(mask_round_trips, 1, overrides, (0, 3, 4)) == [[(saved, True)] * 3]


def test_masks_of_shards_survive_a_checkpoint() -> None:
    overrides = (TENSOR2, "linear.mask_interval=4", "model.num_layers=1")
    assert run_ranks(mask_round_trips, 2, overrides, (3,)) == [[(4, True)]] * 2


def stale_masks() -> tuple[int, bool]:
    """6:8, then dense 8:8, then 6:8 again: the masks of the first phase are gone in the second."""
    phases_ = "linear.phases=[{step: 1, weight_format: dense, sparsity: 8:8}, {step: 2, sparsity: 6:8}]"
    recipe = small_recipe(("linear.mask_interval=100", "optimizer.lr=3e-2", "optimizer.min_lr=1e-2", phases_))
    with trainer_of(recipe) as trainer:
        train_step(trainer, 0)
        in_between = len(trainer.stages.state.kept_masks())
        train_step(trainer, 1)
        layer = trainer.stages.state.layers["decoder.layers.0.mlp.linear_fc1"]
        groups = layer.weight.detach().abs().unflatten(1, (-1, 8))
        fresh = (groups >= groups.kthvalue(3, dim=-1).values.unsqueeze(-1)).flatten(1)
        assert settings_at(recipe.linear, 2).sparsity == (6, 8)
        return in_between, torch.equal(layer.prepared.mask, fresh)


def test_masks_do_not_outlive_a_phase_without_any() -> None:
    assert run_ranks(stale_masks, 1) == [(0, True)]


def evaluation_of(overrides: tuple[str, ...]) -> tuple[float, float, bool]:
    recipe = small_recipe(overrides)
    samples = batch_of(recipe, 5)
    with trainer_of(recipe) as trainer:
        train_step(trainer, 0)
        mine = samples[trainer.rows()]
        before = weight_shards(trainer)
        values = trainer.evaluate(mine), trainer.evaluate(mine)
        same = all(torch.equal(p.value, before[n].value) for n, p in weight_shards(trainer).items())
        return (*values, same and all(chunk.training for chunk in trainer.stages.chunks))


def test_evaluation_is_repeatable_and_changes_nothing() -> None:
    ((first, second, untouched),) = run_ranks(evaluation_of, 1, ())
    assert first == second
    assert untouched
    for value, again, same in run_ranks(evaluation_of, 2, (PIPELINE2, "parallel.virtual_pipeline=2")):
        assert value == again == pytest.approx(first, rel=1e-5)
        assert same
