"""One recipe under every way of cutting it over four ranks: the same model, the same steps (docs/method.md, "Forward").

Integers, scales and hidden states are compared bit by bit, floating sums to the rounding that their order allows.
"""

import numpy as np
import pytest
import torch
from cases import cases
from torch import Tensor
from training_runs import Run, run_of, small_recipe

from megatron_sbn.doctor.logical_tensors import relative

NO_SEQUENCE = "parallel.sequence=false"
TENSOR2, TENSOR4, PIPELINE2 = "parallel.tensor=2", "parallel.tensor=4", "parallel.pipeline=2"
ZERO3 = "parallel.zero_stage=3"
INTERLEAVED = "parallel.virtual_pipeline=2"
LAYOUTS = {
    "tensor2": (2, (TENSOR2,)),
    "tensor2-whole-sequence": (2, (TENSOR2, NO_SEQUENCE)),
    "tensor4": (4, (TENSOR4,)),
    "tensor4-whole-sequence": (4, (TENSOR4, NO_SEQUENCE)),
    "pipeline2": (2, (PIPELINE2,)),
    "pipeline2-interleaved": (2, (PIPELINE2, INTERLEAVED)),
    "pipeline2-one-chunk": (2, (PIPELINE2, "parallel.virtual_pipeline=1")),
    "data2": (2, ()),
    "data2-zero2": (2, ("parallel.zero_stage=2",)),
    "data2-zero3": (2, (ZERO3,)),
    "tensor2-data2-zero3": (4, (TENSOR2, ZERO3)),
    "tensor2-data2-zero3-recomputed": (4, (TENSOR2, ZERO3, "model.recompute_granularity=full")),
    "pipeline2-uneven": (2, (PIPELINE2, "parallel.num_layers_in_first_pipeline_stage=3")),
    "pipeline4": (4, ("parallel.pipeline=4",)),
    "tensor2-pipeline2": (4, (TENSOR2, PIPELINE2)),
    "tensor2-pipeline2-whole-sequence": (4, (TENSOR2, PIPELINE2, NO_SEQUENCE)),
    "tensor2-pipeline2-interleaved": (4, (TENSOR2, PIPELINE2, INTERLEAVED)),
    "tensor2-data2": (4, (TENSOR2,)),
    "pipeline2-data2": (4, (PIPELINE2, "training.micro_batch_size=1")),
    "micro-batches": (1, ("training.micro_batch_size=1",)),
}
# Every kind of cut, and one that has most of them at once.
QUICK = ("tensor2", "tensor2-whole-sequence", "pipeline2-interleaved", "pipeline2-uneven", "data2-zero3")
QUICK += ("tensor2-pipeline2", "micro-batches")
LONG = ("tensor2", "data2", "tensor2-pipeline2")  # also run for 20 steps
DENSE = ("linear.weight_format=dense", "linear.sparsity=8:8")
each_layout = pytest.mark.parametrize("layout", cases(LAYOUTS, QUICK))


def ternary(layout: str) -> Run:
    world_size, overrides = LAYOUTS[layout]
    return run_of(world_size, overrides, 2, 1)


def single() -> Run:
    return run_of(1, (), 2, 1)


@each_layout
def test_initial_weights_are_equal_to_the_bit(layout: str) -> None:
    ours, theirs = ternary(layout).weights(0), single().weights(0)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def test_initial_weights_differ_between_tensors_and_seeds() -> None:
    weights = single().weights(0)
    matrices = [w for w in weights.values() if w.dim() == 2]
    assert len({float(w.double().abs().sum()) for w in matrices}) == len(matrices) == 4 * 4 + 2
    other = run_of(1, ("training.seed=7",), 1, 1).weights(0)
    assert all(not torch.equal(w, other[name]) for name, w in weights.items() if w.dim() == 2)


@each_layout
def test_gamma_and_codes_are_equal_to_the_bit(layout: str) -> None:
    ours, theirs = ternary(layout).prepared(), single().prepared()
    assert ours.keys() == theirs.keys()
    assert len(ours) == 4 * 4 * 2
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@each_layout
def test_hidden_states_are_equal_to_the_bit(layout: str) -> None:
    assert torch.equal(ternary(layout).hidden(), single().hidden())


@pytest.mark.parametrize(
    "layout", cases(["tensor2", "tensor4-whole-sequence", "tensor2-pipeline2", "micro-batches"], ["tensor2-pipeline2"])
)
def test_hidden_states_in_bf16_are_equal_to_the_bit(layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    bf16 = ("model.bf16=true",)
    ours, theirs = run_of(world_size, overrides + bf16, 1, 1), run_of(1, bf16, 1, 1)
    assert ours.hidden().dtype == torch.bfloat16
    assert torch.equal(ours.hidden(), theirs.hidden())
    # The head is a bf16 product over the whole hidden dimension; vocabulary shards only split the sum of exponentials.
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-6)
    assert ours.grad_norms[0] == pytest.approx(theirs.grad_norms[0], rel=5e-3)


@pytest.mark.parametrize(
    "layout",
    cases(
        ["tensor2", "tensor2-whole-sequence", "pipeline2", "data2-zero3", "tensor2-pipeline2"],
        ["tensor2", "pipeline2"],
    ),
)
def test_biases_leave_hidden_states_in_bf16(layout: str) -> None:
    """Added in fp32 within the layer: outside they would make all that follows fp32, which stages do not receive."""
    world_size, overrides = LAYOUTS[layout]
    biases = ("model.bf16=true", "model.add_bias_linear=true")
    ours, theirs = run_of(world_size, overrides + biases, 2, 1), run_of(1, biases, 2, 1)
    assert ours.hidden().dtype == torch.bfloat16
    assert torch.equal(ours.hidden(), theirs.hidden())
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-6)
    assert ours.evaluation == pytest.approx(theirs.evaluation, rel=1e-6)
    assert ours.grad_norms[0] == pytest.approx(theirs.grad_norms[0], rel=5e-3)
    gradients = theirs.gradients(0)
    for name, gradient in ours.gradients(0).items():
        if name.endswith(".bias"):
            assert relative(gradient, gradients[name]) < 0.02, name


# Widths that no vector unit divides: 9 groups a row, 17 or 33 tokens on a rank, 88 features, 3 heads of a rank.
ODD = (
    *("model.num_layers=2", "model.hidden_size=72", "model.ffn_hidden_size=176", "model.num_attention_heads=6"),
    *("model.num_query_groups=2", "model.kv_channels=8"),
)
ODD_LAYOUTS = {
    "17-tokens": (2, (TENSOR2, "model.seq_length=34"), ("model.seq_length=34",)),
    "33-tokens": (2, (TENSOR2, NO_SEQUENCE, "model.seq_length=33"), ("model.seq_length=33",)),
    "split": (4, (TENSOR2, PIPELINE2, "model.seq_length=34", "training.micro_batch_size=1"), ("model.seq_length=34",)),
    "one-token-each": (2, (TENSOR2, "model.seq_length=2"), ("model.seq_length=2",)),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", cases(ODD_LAYOUTS, ["17-tokens", "33-tokens", "one-token-each"]))
def test_odd_widths_and_token_counts_are_equal_to_the_bit(layout: str, dtype: str) -> None:
    world_size, overrides, alone = ODD_LAYOUTS[layout]
    more = (*ODD, f"model.bf16={str(dtype == 'bf16').lower()}")
    ours, theirs = run_of(world_size, (*more, *overrides), 1, 1), run_of(1, (*more, *alone), 1, 1)
    assert torch.equal(ours.hidden(), theirs.hidden())
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-6)
    for name, tensor in theirs.prepared().items():
        assert torch.equal(ours.prepared()[name], tensor), name


@each_layout
def test_first_step_agrees(layout: str) -> None:
    ours, theirs = ternary(layout), single()
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-6)
    assert ours.grad_norms[0] == pytest.approx(theirs.grad_norms[0], rel=1e-5)
    assert ours.evaluation == pytest.approx(theirs.evaluation, rel=1e-6)


@each_layout
def test_gradients_of_the_first_step_agree(layout: str) -> None:
    ours, theirs = ternary(layout).gradients(0), single().gradients(0)
    for name, gradient in ours.items():
        assert theirs[name].abs().max() > 0
        assert relative(gradient, theirs[name]) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("layout", LONG)
def test_twenty_steps_stay_together(layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    dense, dense_single = run_of(world_size, overrides + DENSE, 20, 0), run_of(1, DENSE, 20, 0)
    ours, alone = run_of(world_size, overrides, 20, 0), run_of(1, (), 20, 0)
    assert dense.losses[0] == pytest.approx(dense_single.losses[0], rel=1e-6)
    assert dense.losses == pytest.approx(dense_single.losses, abs=1e-4)
    assert dense.grad_norms == pytest.approx(dense_single.grad_norms, rel=1e-3)
    assert ours.losses == pytest.approx(alone.losses, abs=1e-2)
    assert alone.losses[-1] < alone.losses[0] - 0.1


def test_codes_follow_the_method_for_every_logical_matrix() -> None:
    """gamma = mean|W_part| of q, k, v, gate, up, ...; codes from the method's formulas, in numpy and fp64."""
    run = ternary("tensor2-pipeline2")
    weights, prepared = run.weights(0), run.prepared()
    checked = 0
    for name, weight in weights.items():
        if f"{name.removesuffix('.weight')}.codes" not in prepared:
            continue
        layer = name.removesuffix(".weight")
        gamma = expected_gamma(layer, weight)  # fp64 [out]
        np.testing.assert_allclose(prepared[f"{layer}.gamma"].double().numpy(), gamma, rtol=1e-7)
        stored = prepared[f"{layer}.gamma"].numpy()  # fp32: what codes are made from
        assert np.array_equal(prepared[f"{layer}.codes"].numpy(), expected_codes(weight.numpy(), stored, 6, 8)), layer
        checked += len(np.unique(stored))
    assert checked == 4 * (3 + 1 + 2 + 1)  # q, k, v; attention output; gate, up; down


def expected_gamma(layer: str, weight: Tensor) -> np.ndarray:
    """fp64 mean magnitudes of the parts, spread over their rows."""
    model = small_recipe().model
    magnitudes = weight.double().abs().numpy()
    part = np.zeros(len(magnitudes), dtype=int)
    if layer.endswith("linear_qkv"):
        per_group = model.num_attention_heads // model.query_groups
        group = [0] * (per_group * model.head_dim) + [1] * model.head_dim + [2] * model.head_dim
        part = np.array(group * model.query_groups)
    elif layer.endswith("linear_fc1"):
        part[len(part) // 2 :] = 1
    return np.array([magnitudes[part == p].mean() for p in range(3) if (part == p).any()])[part]


def expected_codes(weight: np.ndarray, gamma: np.ndarray, n: int, m: int) -> np.ndarray:
    """Quantize, then mask: int8 [out, in]; on a tie the lower index is kept."""
    groups = np.abs(weight).reshape(len(weight), -1, m)  # [out, groups, m]
    larger = groups[..., None, :] > groups[..., :, None]
    earlier_tie = (groups[..., None, :] == groups[..., :, None]) & np.tri(m, k=-1, dtype=bool)
    keep = ((larger | earlier_tie).sum(-1) < n).reshape(weight.shape)
    quantized = np.clip(np.rint(weight * (np.float32(1) / gamma)[:, None]), -1, 1)
    return (quantized * keep).astype(np.int8)
