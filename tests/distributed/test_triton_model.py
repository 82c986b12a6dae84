"""A whole model on the triton backend, interpreted: norms and SwiGLU inside the layers, against the CPU backend."""

import pytest
import torch
from ranks import run_ranks
from training_runs import run_of, small_recipe, trainer_of

from megatron_sbn.doctor.logical_tensors import relative

TINY = (
    *("model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.seq_length=6", "training.global_batch_size=2"),
    *("training.micro_batch_size=1", "linear.sparsity=[6,8]"),
)
TRITON = "linear.backend=triton"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="ranks of this test interpret kernels on CPU")


def fused_layers() -> dict[str, bool]:
    with trainer_of(small_recipe((*TINY, TRITON))) as trainer:
        return {name: layer.fuses_input for name, layer in trainer.stages.state.layers.items()}


def test_the_layers_that_follow_a_norm_or_swiglu_absorb_it() -> None:
    (fused,) = run_ranks(fused_layers, 1)
    assert len(fused) == 4
    assert all(fused.values())


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, ()),
        (2, ("parallel.tensor=2",)),
        pytest.param(2, ("parallel.tensor=2", "parallel.sequence=false"), marks=pytest.mark.slow),
    ],
    ids=["1", "tp2 sp", "tp2"],
)
def test_losses_codes_and_gradients_are_those_of_the_cpu_backend(world: int, layout: tuple[str, ...]) -> None:
    ours, theirs = run_of(world, (*TINY, TRITON, *layout)), run_of(1, TINY)
    for name, value in theirs.prepared().items():
        assert torch.equal(ours.prepared()[name], value), name
    assert ours.evaluation == pytest.approx(theirs.evaluation, rel=1e-5)
    assert relative(ours.hidden(), theirs.hidden()) < 1e-4
    expected = theirs.gradients(0)
    for name, value in ours.gradients(0).items():
        # A token that rounds to another integer, because the norm's last bit differs, changes 1/127 of it.
        assert relative(value, expected[name]) < 1e-2, name


@pytest.mark.parametrize("world", [1, 2])
def test_layouts_agree_with_each_other_closely(world: int) -> None:
    one, cut = run_of(1, (*TINY, TRITON)), run_of(world, (*TINY, TRITON, f"parallel.tensor={world}"))
    assert torch.equal(one.hidden(), cut.hidden())
    for name, value in cut.gradients(0).items():
        assert relative(value, one.gradients(0)[name]) < 1e-5, name


def test_int8_backward_and_planes_train() -> None:
    run = run_of(1, (*TINY, TRITON, "linear.backward=int8", "linear.forward_form=planes"))
    plain = run_of(1, (*TINY, TRITON))
    assert torch.equal(run.hidden(), plain.hidden())
    assert run.losses == plain.losses
    for name, value in run.gradients(0).items():
        assert relative(value, plain.gradients(0)[name]) < 0.1, name


def test_a_form_that_cannot_serve_stops_the_run_with_a_line() -> None:
    with pytest.raises(AssertionError, match="linear.forward_form: form 'mma_sp' cannot serve .* 6:8 does not promise"):
        run_ranks(fused_layers_with_mma_sp, 1)


def fused_layers_with_mma_sp() -> None:
    with trainer_of(small_recipe((*TINY, TRITON, "linear.forward_form=mma_sp"))):
        pass
