"""The standard error of a validation is that of its samples, whatever ranks they are spread over."""

import math

import numpy as np
import pytest
from training_runs import batch_of, run_ranks, small_recipe, trainer_of


def errors_of(overrides: tuple[str, ...]) -> tuple[float, float | None, list[float]]:
    """Mean and standard error over a batch, and the loss of each of this replica's samples by itself."""
    recipe = small_recipe(overrides)
    samples = batch_of(recipe, 5)
    with trainer_of(recipe) as trainer:
        mine = samples[trainer.rows()]
        mean, error = trainer.evaluate_with_error(mine)
        alone = [trainer.evaluate(mine[number : number + 1]) for number in range(len(mine))]
    return mean, error, alone


@pytest.fixture(scope="module")
def single() -> tuple[float, float | None, list[float]]:
    (result,) = run_ranks(errors_of, 1, ())
    return result


def test_it_is_the_formula_over_samples(single: tuple[float, float | None, list[float]]) -> None:
    mean, error, alone = single
    assert len(alone) > 2
    assert mean == pytest.approx(np.mean(alone), rel=1e-5)
    assert error == pytest.approx(np.std(alone, ddof=1) / math.sqrt(len(alone)), rel=1e-4)


@pytest.mark.parametrize("overrides", [(), ("parallel.tensor=2",), ("parallel.pipeline=2",)], ids=str)
def test_every_layout_says_the_same(
    single: tuple[float, float | None, list[float]], overrides: tuple[str, ...]
) -> None:
    results = run_ranks(errors_of, 2, overrides)
    assert len({result[:2] for result in results}) == 1
    assert results[0][0] == pytest.approx(single[0], rel=1e-5)
    assert results[0][1] == pytest.approx(single[1], rel=1e-4)


def one_sample(overrides: tuple[str, ...]) -> float | None:
    recipe = small_recipe(overrides)
    with trainer_of(recipe) as trainer:
        return trainer.evaluate_with_error(batch_of(recipe, 5)[:1])[1]


def test_one_sample_has_none() -> None:
    assert run_ranks(one_sample, 1, ()) == [None]
