"""What counts as a bad step."""

import math

import pytest

from megatron_sbn.config import Training
from megatron_sbn.training.bad_steps import SpikeDetector


def judge(**settings: object) -> SpikeDetector:
    return SpikeDetector(Training(steps=1, global_batch_size=1, micro_batch_size=1, spike_window=4, **settings))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_whatever_is_set(value: float) -> None:
    assert judge().loss(value) == f"loss is {value}"
    assert judge().norm(value) == f"gradient norm is {value}"


def test_spikes_are_judged_by_the_median_of_a_full_window() -> None:
    watch = judge(spike_loss=1.0, spike_grad_norm=3.0)
    for loss in (5.0, 9.0, 5.0):
        assert watch.loss(50.0) == watch.norm(50.0) == ""
        watch.accept(loss, 1.0)
    watch.accept(5.0, 1.5)
    assert watch.loss(6.0) == ""
    assert watch.loss(6.01) == "loss is 6.0100, 1.0100 over the 5.0000 of the last 4 steps"
    assert watch.norm(3.0) == ""
    assert watch.norm(3.1) == "gradient norm is 3.1, where the last 4 steps had 1"
    watch.accept(5.5, 1.0)  # the window moves on
    watch.accept(5.5, 1.0)
    watch.accept(5.5, 1.0)
    assert watch.loss(6.4) == ""


def test_nothing_set_nothing_judged() -> None:
    watch = judge()
    for _ in range(5):
        watch.accept(1.0, 1.0)
    assert watch.loss(1e30) == watch.norm(1e30) == ""


def test_a_window_is_taken_back() -> None:
    first, second = judge(spike_loss=1.0), judge(spike_loss=1.0)
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
        first.accept(loss, loss)
    second.recall(tuple(first.losses), tuple(first.norms))
    assert second.losses == first.losses
    assert second.loss(4.6) == first.loss(4.6) != ""
