"""A run that is continued with another recipe: what is refused, what is said, what is of no account."""

from pathlib import Path

import pytest

from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.errors import RecipeError
from megatron_sbn.runs.recipe_changes import changed_keys, check_changes, check_steps, describe, earlier_recipe

QUICK = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
RUN = Path("runs/first")


def recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICK, ["training.steps=100", "optimizer.lr_decay_steps=100", *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["linear.sparsity=2:8"],
            "linear.sparsity was 6:8 at step 0 of runs/first, which has done 40 steps, and is 2:8",
        ),
        (["linear.weight_format=dense"], "linear.weight_format was ternary at step 0"),
        (["linear.activation_bits=none"], "linear.activation_bits was 8 at step 0"),
        (["linear.phases=[{step: 39, sparsity: '4:8'}]"], "linear.sparsity was 6:8 at step 39"),
        (
            ["model.rotary_base=500000"],
            "model.rotary_base was 10000 in runs/first, which has done 40 steps, and is 500000",
        ),
        (["training.seed=3"], "training.seed was 1234"),
        (["training.global_batch_size=32"], "training.global_batch_size was 16"),
        (["model.seq_length=64"], "model.seq_length was 128"),
        (["start_from=elsewhere"], "start_from = elsewhere: runs/first has done 40 steps and began from nothing"),
        (["model.layernorm_epsilon=1e-2"], "model.layernorm_epsilon was"),
        (["data.train=[{path: a, weight: 1}]"], "data.train was"),
        (["training.steps=39"], "training.steps = 39: runs/first has done 40 steps already; set 40 or more"),
    ],
)
def test_what_makes_it_another_experiment_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        check_changes(recipe(), recipe(*overrides), 40, RUN)
    assert "name another run_dir" in str(error.value)
    if "model." not in message and "start_from =" not in message:
        assert "start_from=runs/first start_with=weights" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.adam_beta2=0.5", "optimizer.adam_beta2: 0.95 -> 0.5"),
        ("training.steps=200", "training.steps: 100 -> 200"),
        ("linear.backward=int8", "linear.backward: exact -> int8"),
        ("model.bf16=true", "model.bf16: false -> true"),
        ("data.validation=elsewhere", "data.validation: "),
        ("linear.phases=[{step: 40, sparsity: '4:8'}]", "linear.phases: none -> ternary 6:8 -> ternary 4:8 at step 40"),
    ],
)
def test_what_changes_the_rest_of_it_is_said(override: str, line: str) -> None:
    said = describe(check_changes(recipe(), recipe(override), 40, RUN))
    assert any(one.startswith(line) for one in said), said


@pytest.mark.parametrize(
    "override",
    [
        *("parallel.tensor=1", "parallel.zero_stage=2", "device=cpu", "checkpoint.keep=5", "tracking.enabled=false"),
        *("training.micro_batch_size=1", "linear.forward_form=planes", "training.log_interval=7", "run_dir=moved"),
    ],
)
def test_where_and_how_it_is_computed_is_of_no_account(override: str) -> None:
    assert check_changes(recipe(), recipe(override), 40, RUN) == {}


def test_every_key_has_been_thought_of() -> None:
    """A new key of these sections that counts is to be refused or said on purpose: add it here."""
    counts = set(changed_keys(recipe(), _everything_else()))
    assert {"training.on_bad_step", "training.spike_loss", "training.validation_samples", "optimizer.lr"} <= counts
    assert not {key for key in counts if key.startswith(("parallel.", "checkpoint.", "tracking."))}


def _everything_else() -> Recipe:
    return recipe(
        *("training.on_bad_step=skip", "training.spike_loss=3.0", "training.validation_samples=8", "optimizer.lr=1e-2"),
        *("parallel.sequence=false", "checkpoint.interval=7", "tracking.experiment=other"),
    )


def test_the_recipe_of_another_version_is_not_compared(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: old\nmodel: {layers: 3}\n")
    assert earlier_recipe(tmp_path / "recipe.yaml") is None
    (tmp_path / "recipe.yaml").write_text(recipe().to_yaml())
    assert earlier_recipe(tmp_path / "recipe.yaml") == recipe()


def test_the_same_start_is_no_change(tmp_path: Path) -> None:
    """The record has the step that RUN alone stood for when the run began."""
    begun = recipe("start_from=runs/a@30")
    for given in ("runs/a", "runs/a@30"):
        assert check_changes(begun, recipe(f"start_from={given}"), 40, RUN) == {}
    assert check_changes(begun, recipe(), 40, RUN) == {}
    for given in ("start_from=runs/a@20", "start_from=runs/b", "start_from=runs/a start_with=weights"):
        with pytest.raises(RecipeError, match="began from runs/a@30; leave it out"):
            check_changes(begun, recipe(*given.split()), 40, RUN)


def test_steps_are_compared_where_the_recipe_cannot_be() -> None:
    with pytest.raises(RecipeError, match="has done 101 steps already"):
        check_steps(recipe(), 101, RUN)
