"""Learning rate and weight decay: the numbers of docs/method.md, "Training", and formulas computed independently."""

import math
from pathlib import Path

import pytest

from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.training.schedule import describe, learning_rate, weight_decay


def recipe(weight_format: str = "ternary", steps: int = 100_000, **optimizer: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "schedule",
            "model": {
                "num_layers": 2,
                "hidden_size": 64,
                "ffn_hidden_size": 128,
                "num_attention_heads": 4,
                "seq_length": 32,
                "vocab_size": 100,
            },
            "linear": {"weight_format": weight_format},
            "data": {"train": "shard"},
            "optimizer": optimizer,
            "training": {"steps": steps, "global_batch_size": 8, "micro_batch_size": 4},
        }
    )


REFERENCE = {"lr": 3e-4, "min_lr": 1e-5, "lr_warmup_steps": 1000}


def test_the_references_learning_rate() -> None:
    run = recipe(**REFERENCE)
    for step, expected in (
        (0, 3e-7),  # the first step has a thousandth, not nothing
        (499, 1.5e-4),
        (999, 3e-4),
        (1000, 3e-4),
        (50_500, (3e-4 + 1e-5) / 2),
        (100_000, 1e-5),
        (200_000, 1e-5),
    ):
        assert learning_rate(run, step) == pytest.approx(expected, rel=1e-12), step
    for step in range(1000, 100_000, 4321):
        cosine = math.cos(math.pi * (step - 1000) / 99_000)
        assert learning_rate(run, step) == pytest.approx(1e-5 + 2.9e-4 * (1 + cosine) / 2, rel=1e-12)


def test_the_references_weight_decay() -> None:
    ternary, dense = recipe(**REFERENCE), recipe("dense", **REFERENCE)
    for step, expected in ((0, 0.1), (25_000, 0.05), (50_000, 0.0), (75_000, 0.0), (100_000, 0.0)):
        assert weight_decay(ternary, step) == pytest.approx(expected, abs=1e-15), step
        assert weight_decay(dense, step) == 0.1
    quarter = 0.1 * (1 + math.cos(math.pi / 4)) / 2
    assert weight_decay(ternary, 12_500) == pytest.approx(quarter, rel=1e-12)


def test_weight_decay_style_overrides_the_format() -> None:
    assert weight_decay(recipe(weight_decay_style="constant"), 90_000) == 0.1
    assert weight_decay(recipe("dense", weight_decay_style="cosine_to_zero"), 90_000) == 0.0


def test_linear_and_constant() -> None:
    linear = recipe(lr_decay_style="linear", steps=100, lr=1.0, min_lr=0.5)
    assert [learning_rate(linear, step) for step in (0, 50, 100, 101)] == [1.0, 0.75, 0.5, 0.5]
    constant = recipe(lr_decay_style="constant", steps=100, lr=1.0, min_lr=0.5, lr_warmup_steps=4)
    assert [learning_rate(constant, step) for step in (0, 1, 2, 3, 4, 99)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_decay_steps_may_differ_from_the_length_of_training() -> None:
    """A run that is cut short sees the same rates as the long one."""
    long, short = recipe(steps=1000), recipe(steps=300, lr_decay_steps=1000)
    for step in range(0, 300, 7):
        assert learning_rate(long, step) == learning_rate(short, step)
        assert weight_decay(long, step) == weight_decay(short, step)
    assert weight_decay(long, 500) == 0.0


STAGES = [
    {"step": 0, "lr": 1.5e-3, "end_lr": 8e-4, "weight_decay": 0.1},
    {"step": 600, "lr": 5e-4, "end_lr": 0.0, "weight_decay": 0.0},
]


@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_the_two_stages_of_bitnet_2b4t(style: str) -> None:
    run = recipe(steps=1000, stages=STAGES, lr_warmup_steps=100, lr_decay_style=style)
    for step, expected in (
        (0, 1.5e-5),
        (99, 1.5e-3),
        (100, 1.5e-3),
        (350, (1.5e-3 + 8e-4) / 2),
        (600, 5e-4),
        (800, 2.5e-4),
        (1000, 0.0),
    ):
        assert learning_rate(run, step) == pytest.approx(expected, rel=1e-12, abs=1e-18), step
    assert learning_rate(run, 599) == pytest.approx(8e-4, rel=2e-2)
    assert [weight_decay(run, step) for step in (0, 599, 600, 1000)] == [0.1, 0.1, 0.0, 0.0]


def test_schedules_are_monotone_after_warm_up_and_never_negative() -> None:
    for run in (recipe(**REFERENCE), recipe("dense", steps=50, lr_warmup_steps=50)):
        warmup, steps = run.optimizer.lr_warmup_steps, run.training.steps
        rates = [learning_rate(run, step) for step in range(0, steps, max(1, steps // 500))]
        peak = max(rates)
        assert peak <= run.optimizer.lr * (1 + 1e-12)
        falling = [learning_rate(run, step) for step in range(warmup, steps, max(1, steps // 500))]
        assert falling == sorted(falling, reverse=True)
        assert min(rates) > 0
        assert all(weight_decay(run, step) >= 0 for step in range(0, steps, 97))


@pytest.mark.parametrize(("name", "warmup"), [("quickstart", 30), ("tiny/base", 20), ("qwen2.5-3b/ternary-6of8", 1000)])
def test_the_shipped_schedules_follow_the_number_of_steps(name: str, warmup: int) -> None:
    """`training.steps=300` trains no step at the floor but the last; warm-up keeps its share."""
    path = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    shipped = load_recipe(path)
    steps = shipped.training.steps
    assert shipped.optimizer.warmup_steps(steps) == warmup
    longer = load_recipe(path, [f"training.steps={3 * steps}"])
    rates = [learning_rate(longer, step) for step in range(3 * steps)]
    assert rates.index(max(rates)) == pytest.approx(3 * warmup, abs=2)
    assert min(rates[3 * warmup : -1]) > longer.optimizer.min_lr
    assert "at the" not in describe(longer)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 100, "lr_warmup_steps": 10}, "10 warm-up steps, then cosine from 0.0003 to 1e-05 at step 100"),
        ({"steps": 300, "lr_decay_steps": 90}, "and 1e-05 for the last 210 steps (optimizer.lr_decay_steps = 90)"),
        ({"steps": 50, "lr_decay_steps": 100}, "; this run ends before, at 0.00016"),
        ({"steps": 50, "lr_decay_style": "constant"}, "0.0003"),
        ({"steps": 1000, "stages": STAGES}, "2 stages from steps 0, 600"),
    ],
)
def test_the_schedule_in_words(settings: dict, words: str) -> None:
    assert words in describe(recipe(**settings))
