"""What a run says at its start and end, and when it knows how long it will take."""

from pathlib import Path
from unittest import mock

import torch

from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.parallel.state import Axis, ParallelState
from megatron_sbn.runs.folder import RunFolder
from megatron_sbn.training.run_summary import TIMED_STEPS, EtaEstimator, shutdown_summary, startup_summary

RECIPES = Path(__file__).parents[2] / "recipes"
KERNELS = {f"linear_{name} 8 x 8": "cpu: forward" for name in ("qkv", "proj", "fc1", "fc2")}


def lines(recipe: Recipe, world: int, folder: Path, first: int = 0) -> list[str]:
    size = recipe.parallel.tensor * recipe.parallel.pipeline
    parallel = mock.create_autospec(ParallelState, instance=True)
    parallel.world_size, parallel.device = world, torch.device("cpu")
    parallel.data = Axis(0, world // size, mock.Mock())
    parallel.describe.return_value = "the layout"
    return startup_summary(recipe, parallel, RunFolder(folder, False), first, KERNELS)


def test_the_start_fits_on_a_screen_in_plain_text(tmp_path: Path) -> None:
    for path in ("quickstart.yaml", "quickstart-moe.yaml", "quickstart-dense.yaml", "qwen2.5-3b/ternary-2of4.yaml"):
        recipe = load_recipe(RECIPES / path)
        said = lines(recipe, 4, tmp_path)
        assert len(said) <= 20
        assert all(line.isascii() for line in said)
        assert said[0].startswith(f"{recipe.name} starts: ")
        assert str(tmp_path) in said[0]
        assert "unknown until step 5" in "\n".join(said)


def test_it_says_what_the_recipe_says(tmp_path: Path) -> None:
    text = "\n".join(lines(load_recipe(RECIPES / "qwen2.5-3b/ternary-6of8.yaml"), 32, tmp_path, first=40))
    assert "continues after step 40: 3.40B parameters" in text
    assert "the layout, ZeRO-1" in text
    assert "16 micro-batches of 2 x 2048 tokens" in text
    assert "ternary 6:8, 8-bit activations, backward exact; bf16 between layers" in text
    assert "steps 41 to 100000, 104.86B tokens in all, 1.05M a step" in text
    assert "unknown until step 45" in text


def test_passwords_are_masked_at_both_ends(tmp_path: Path) -> None:
    uri = "tracking.uri=https://user:hunter2@mlflow.example"
    recipe = load_recipe(RECIPES / "quickstart.yaml", [uri])
    text = "\n".join(
        [*lines(recipe, 2, tmp_path), *shutdown_summary(recipe, RunFolder(tmp_path, None), "done: 9 steps")]
    )
    assert "hunter2" not in text
    assert text.count("https://***@mlflow.example, experiment quickstart") == 2


def test_the_end_says_where_things_are(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "quickstart.yaml", ["checkpoint.interval=0", "tracking.enabled=false"])
    text = "\n".join(shutdown_summary(recipe, RunFolder(tmp_path, None), "done: 9 steps"))
    assert str(tmp_path / "metrics.jsonl") in text
    assert "none: checkpoint.interval = 0" in text
    assert "off (tracking.enabled = false)" in text


def test_time_is_expected_from_steps_after_the_first() -> None:
    pace = EtaEstimator(10, 100)
    notes = [pace.note(step, 50.0 if step == 11 else 2.0) for step in range(11, 30)]
    (line,) = [text for text in notes if text is not None]
    assert notes.index(line) == TIMED_STEPS - 1
    assert "0:02:50 for 85 steps, at the 2 s of steps 12 to 15" in line


def test_a_job_that_ends_before_it_is_known_expects_nothing(tmp_path: Path) -> None:
    pace = EtaEstimator(0, 5)
    assert [pace.note(step, 1.0) for step in range(1, 6)] == [None] * 5
    short = load_recipe(RECIPES / "quickstart.yaml", ["training.steps=5", "optimizer.lr_warmup_steps=0"])
    assert "unknown: it takes 5 steps to tell" in "\n".join(lines(short, 2, tmp_path))
