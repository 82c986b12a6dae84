"""The update that ZeRO makes, against one AdamW in one process on the gathered gradients."""

import numpy as np
import pytest
import torch
from cases import cases
from torch import Tensor
from training_runs import Run, run_of, small_recipe

from megatron_sbn.doctor.logical_tensors import relative
from megatron_sbn.model import EMBEDDING
from megatron_sbn.training.schedule import learning_rate, weight_decay

TENSOR2, PIPELINE2, ZERO2 = "parallel.tensor=2", "parallel.pipeline=2", "parallel.zero_stage=2"
ZERO3 = "parallel.zero_stage=3"
TIED = "model.share_embeddings_and_output_weights=true"
BIASES = ("model.add_bias_linear=true", "model.add_qkv_bias=true")
STEPS = 3
# A large rate, a warm-up, decay that changes every step and a norm that is clipped: each would show.
COMMON = ("optimizer.lr=1e-2", "optimizer.lr_warmup_steps=2", "optimizer.clip_grad=0.5", f"training.steps={2 * STEPS}")
CASES = {
    "single": (1, ()),
    "single-unclipped": (1, ("optimizer.clip_grad=0",)),
    "data2-zero1": (2, ()),
    "data2-zero2": (2, (ZERO2,)),
    "data2-zero2-unclipped": (2, (ZERO2, "optimizer.clip_grad=0")),
    "tensor2-biases": (2, (TENSOR2, *BIASES)),
    "tensor2-tied": (2, (TENSOR2, TIED)),
    "pipeline2-tied": (2, (PIPELINE2, TIED)),
    "tensor2-pipeline2": (4, (TENSOR2, PIPELINE2)),
    "tensor2-pipeline2-tied-biases": (4, (TENSOR2, PIPELINE2, TIED, *BIASES)),
    "tensor2-data2-zero2": (4, (TENSOR2, ZERO2)),
    "pipeline2-data2-zero2-tied": (4, (PIPELINE2, ZERO2, TIED)),
    "single-zero3": (1, (ZERO3,)),
    "data2-zero3": (2, (ZERO3,)),
    "data2-zero3-unclipped-tied": (2, (ZERO3, TIED, "optimizer.clip_grad=0")),
    "tensor2-data2-zero3-biases": (4, (TENSOR2, ZERO3, *BIASES)),
}
QUICK = "single data2-zero1 data2-zero2-unclipped pipeline2-tied tensor2-pipeline2-tied-biases single-zero3".split()
QUICK += "data2-zero3-unclipped-tied tensor2-biases tensor2-data2-zero2".split()
ZERO3_VARIANTS = [
    ("linear.order=mask_then_quant",),
    ("linear.weight_format=dense", "linear.sparsity=6:8"),
    ("linear.backward=int8",),
    ("linear.sr_ste_decay=0.1",),
    ("linear.masked_gradient=masked",),
    ("linear.activation_bits=none",),
]
each_case = pytest.mark.parametrize("case", cases(CASES, QUICK))


def run(case: str) -> tuple[tuple[str, ...], Run]:
    world_size, overrides = CASES[case]
    overrides = COMMON + overrides
    return overrides, run_of(world_size, overrides, STEPS, STEPS)


def norm_of(gradients: dict[str, Tensor]) -> float:
    return float(np.sqrt(sum(float(g.double().square().sum()) for g in gradients.values())))


@each_case
def test_grad_norm_is_that_of_the_logical_gradients(case: str) -> None:
    overrides, ours = run(case)
    single = run_of(1, tuple(o for o in overrides if not o.startswith("parallel.")), STEPS, STEPS)
    for step in range(STEPS):
        assert ours.grad_norms[step] == pytest.approx(norm_of(ours.gradients(step)), rel=1e-6)
    # What is summed where a rank sees only a part (sequence parallelism, tied embeddings) agrees with one device.
    assert ours.gradients(0).keys() == single.gradients(0).keys()
    for name, gradient in single.gradients(0).items():
        assert relative(ours.gradients(0)[name], gradient) < 1e-5, name


@each_case
def test_weights_are_those_of_one_adamw(case: str) -> None:
    overrides, ours = run(case)
    recipe = small_recipe(overrides)
    weights = {name: weight.clone().requires_grad_() for name, weight in ours.weights(0).items()}
    decay, rest = ([w for w in weights.values() if (w.dim() > 1) is matrix] for matrix in (True, False))
    adamw = torch.optim.AdamW([{"params": decay}, {"params": rest}], betas=(0.9, 0.95), eps=1e-8, foreach=False)
    clipped = 0
    for step in range(STEPS):
        gradients = ours.gradients(step)
        clip = recipe.optimizer.clip_grad
        scale = min(1.0, clip / (norm_of(gradients) + 1e-6)) if clip else 1.0
        clipped += scale < 1
        for name, weight in weights.items():
            weight.grad = gradients[name] * scale
        for group, decays in zip(adamw.param_groups, (True, False), strict=True):
            group["lr"] = learning_rate(recipe, step)
            group["weight_decay"] = weight_decay(recipe, step) if decays else 0.0
        adamw.step()
        for name, weight in ours.weights(step + 1).items():
            assert relative(weight, weights[name]) < 1e-6, (step, name)
    assert clipped == (STEPS if recipe.optimizer.clip_grad else 0)
    moved = [float((ours.weights(STEPS)[name] - before).abs().max()) for name, before in ours.weights(0).items()]
    assert min(moved) > 1e-3


@pytest.mark.parametrize(
    ("case", "counts"),
    [
        pytest.param("tensor2-tied", [True, True], marks=pytest.mark.slow),
        ("pipeline2-tied", [True, False]),
        ("tensor2-pipeline2-tied-biases", [True, True, False, False]),
    ],
)
def test_a_tied_embedding_is_one_parameter_and_counts_once(case: str, counts: list[bool]) -> None:
    _, ours = run(case)
    assert "output_layer.weight" not in ours.weights(0)
    assert [rank.weights[0][EMBEDDING].counts for rank in ours.ranks] == counts


@pytest.mark.parametrize("model", [(), ("model.bf16=true",)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", ["ternary", "dense"])
def test_many_micro_batches_are_one_big_batch(form: str, model: tuple[str, ...]) -> None:
    """Gradients add up in fp32 whatever the activations are: in bf16 the sum of 8 would be off by about 1e-2."""
    overrides = ("training.global_batch_size=8", f"linear.weight_format={form}", *model)
    many = run_of(1, (*overrides, "training.micro_batch_size=1"), 1, 1)
    one = run_of(1, (*overrides, "training.micro_batch_size=8"), 1, 1)
    assert many.losses[0] == pytest.approx(one.losses[0], rel=1e-6)
    assert torch.equal(many.hidden(), one.hidden()) or form == "dense"
    for name, gradient in many.gradients(0).items():
        assert gradient.dtype == torch.float32
        assert relative(gradient, one.gradients(0)[name]) < 1e-5, name


@pytest.mark.parametrize(
    "variant",
    cases(ZERO3_VARIANTS, ZERO3_VARIANTS[:2]),
    ids=lambda variant: variant[0].removeprefix("linear."),
)
def test_zero3_trains_every_variant_as_zero1_does(variant: tuple[str, ...]) -> None:
    """Weights that are seldom there whole: scales of survivors, SR-STE's decay and floating products gather them."""
    overrides = ("model.num_layers=2", *COMMON, *variant)
    cut, whole = run_of(2, (*overrides, ZERO3), 2, 2), run_of(2, overrides, 2, 2)
    assert cut.losses[0] == pytest.approx(whole.losses[0], rel=1e-6)
    for name, tensor in whole.prepared().items():
        assert torch.equal(cut.prepared()[name], tensor), name
    for name, gradient in whole.gradients(0).items():
        assert relative(cut.gradients(0)[name], gradient) < 1e-5, name
    assert cut.grad_norms[0] == pytest.approx(whole.grad_norms[0], rel=1e-5)
