"""NaN in the loss, the gradients or the weights is reported with step, rank or layer, and nothing is updated."""

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from training_runs import small_recipe, train_step, trainer_of

from megatron_sbn.doctor.recorder import weight_shards
from megatron_sbn.errors import NumericalError
from megatron_sbn.training.step import Trainer

TENSOR2, PIPELINE2 = "parallel.tensor=2", "parallel.pipeline=2"
NORM = "decoder.final_layernorm.weight"


def poison_weight(trainer: Trainer) -> None:
    """NaN in the last norm."""
    (norm,) = [p.parameter for p in trainer.stages.parameters if p.name == NORM]
    norm.data[3] = float("nan")


def poison_gradient(trainer: Trainer) -> None:
    """NaN in one gradient, after a finite loss."""
    finalize = trainer.stages.config.finalize_model_grads_func

    def poisoned(*args: object, **kwargs: object) -> None:
        finalize(*args, **kwargs)
        trainer.stages.parameters[-1].parameter.grad.view(-1)[0] = float("nan")

    trainer.stages.config.finalize_model_grads_func = poisoned


POISONS = {"weight": poison_weight, "gradient": poison_gradient}


def kept(trainer: Trainer) -> list[Tensor]:
    """Masters and moments of this rank."""
    fragments = map(trainer.zero.fragment, trainer.stages.parameters)
    return [tensor for fragment in fragments if fragment is not None for tensor in fragment.tensors.values()]


def poisoned_step(overrides: tuple[str, ...], poison: str, bad_rank: int) -> tuple[str, bool]:
    """The message of the second step, and whether weights, masters and moments are as they were."""
    with trainer_of(small_recipe(overrides)) as trainer:
        train_step(trainer, 0)
        if trainer.parallel.rank == bad_rank:
            POISONS[poison](trainer)
        before = [p.value for p in weight_shards(trainer).values()]
        before += [t.clone() for t in kept(trainer)]
        with pytest.raises(NumericalError) as expected:
            train_step(trainer, 1)
        after = [p.value for p in weight_shards(trainer).values()]
        after += kept(trainer)
        untouched = all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(after, before, strict=True))
    return str(expected.value), untouched


@pytest.mark.parametrize(
    ("world_size", "overrides", "poison", "bad_rank", "expected"),
    [
        (1, (), "weight", 0, "step 2: loss is nan on rank 0;"),
        (2, (), "weight", 1, "step 2: loss is nan on rank 1;"),
        (2, (PIPELINE2,), "weight", 1, "step 2: loss is nan on rank 1;"),
        # Both ranks of the last stage compute one loss: their vocabulary shards are summed.
        (4, (TENSOR2, PIPELINE2), "weight", 3, "step 2: loss is nan on rank 2, 3;"),
        (1, (), "gradient", 0, "step 2: gradient norm is inf;"),
        (2, (), "gradient", 1, "step 2: gradient norm is inf on no single rank"),
        (2, ("parallel.zero_stage=2",), "gradient", 0, "step 2: gradient norm is inf on no single rank"),
        (4, (TENSOR2, PIPELINE2), "gradient", 2, "step 2: gradient norm is inf on no single rank"),
    ],
    ids=str,
)
def test_a_step_that_is_not_finite_changes_nothing(
    world_size: int, overrides: tuple[str, ...], poison: str, bad_rank: int, expected: str
) -> None:
    for message, untouched in run_ranks(poisoned_step, world_size, overrides, poison, bad_rank):
        assert message.startswith(expected)
        assert untouched
        assert "\n" not in message


def poisoned_layer(value: float) -> tuple[str, bool] | None:
    """What preparing says where one rank of the second stage holds a bad weight."""
    with trainer_of(small_recipe((TENSOR2, PIPELINE2))) as trainer:
        if trainer.parallel.rank == 2:
            trainer.stages.state.layers["decoder.layers.3.mlp.linear_fc2"].weight.data[5, 7] = value
        try:
            trainer.stages.state.prepare(1)
        except NumericalError as error:
            return str(error), error.on_every_rank
    return None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_weight_is_named_by_the_ranks_that_share_the_layer(value: float) -> None:
    expected = "decoder.layers.3.mlp.linear_fc2.weight holds NaN or Inf; resume from the last good checkpoint"
    # Not printed by every rank: rank 0, which speaks for errors that all ranks see, is on the other stage.
    assert run_ranks(poisoned_layer, 4, value) == [None, None, (expected, False), (expected, False)]
