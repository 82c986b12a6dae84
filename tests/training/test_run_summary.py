"""What a run says at its start and end."""

from pathlib import Path
from unittest import mock

import numpy as np
import torch

from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.data.shards import ShardWriter
from megatron_sbn.parallel.state import Axis, ParallelState
from megatron_sbn.runs.folder import RunFolder
from megatron_sbn.training.run_summary import shutdown_summary, startup_summary

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


def test_it_says_what_the_recipe_says(tmp_path: Path) -> None:
    text = "\n".join(lines(load_recipe(RECIPES / "qwen2.5-3b/ternary-6of8.yaml"), 32, tmp_path, first=40))
    assert "continues after step 40: 3.40B parameters" in text
    assert "the layout, ZeRO-1" in text
    assert "16 micro-batches of 2 x 2048 tokens" in text
    assert "ternary 6:8, 8-bit activations, backward exact; bf16 between layers" in text
    assert "steps 41 to 100000, 104.86B tokens in all, 1.05M a step" in text


def test_it_says_how_often_the_data_is_read(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.bin", tmp_path / "a.idx", 4096)
    writer.add(np.zeros(128 * 10 + 1, dtype=np.int64))
    writer.finish()
    text = "\n".join(lines(load_recipe(RECIPES / "quickstart.yaml", [f"data.train={tmp_path}/a"]), 2, tmp_path))
    assert f"  data       {tmp_path}/a: 1,281 tokens, 144 passes\n  data       warning: " in text


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
    assert "checkpoint none" in text
    assert "off (tracking.enabled = false)" in text
