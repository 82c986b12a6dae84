"""The main job's corpus, table and verdict; the job itself is `make quickstart`."""

import dataclasses
import sysconfig
from pathlib import Path

import pytest

from megatron_sbn.cli import quickstart
from megatron_sbn.config import load_recipe
from megatron_sbn.errors import NumericalError
from megatron_sbn.runs.metrics_file import MetricsFile

GOOD = quickstart.Outcome("ternary", Path("runs/a"), 100.0, 0.346, 0.0377, 2197.4)
DENSE = dataclasses.replace(GOOD, name="dense", perplexity=150.0, zero_fraction=0.0, flip_rate=None)


@pytest.mark.parametrize(
    ("perplexities", "status"),
    [((100.0, 150.0), 0), ((100.0, 200.0), 0), ((100.0, 200.1), 1), ((201.0, 100.0), 1)],
)
def test_both_models_must_be_three_times_better_than_unigram(
    perplexities: tuple[float, float], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = [dataclasses.replace(GOOD, perplexity=p) for p in perplexities]
    assert quickstart._verdict(outcomes, 600.0) == status
    assert ("is not 3x better than the unigram perplexity 600.0" in capsys.readouterr().err) == bool(status)


def test_the_table_shows_both_models_the_folders_and_the_page() -> None:
    recipes = [load_recipe(quickstart.RECIPES / f"{name}.yaml") for name in quickstart.MODELS]
    table = quickstart._table(recipes, [GOOD, DENSE], 600.0)
    rows = [line.split() for line in table.splitlines() if line.startswith(("ternary ", "dense "))]
    assert rows == [
        ["ternary", "100.00", "6.0x", "better", "34.6%", "3.77%", "2,197"],
        ["dense", "150.00", "4.0x", "better", "0.0%", "-", "2,197"],
    ]
    assert "run folder: runs/a" in table
    assert f"mlflow server --backend-store-uri sqlite:///{Path('runs/mlflow.db').resolve()}" in table


def test_an_outcome_is_the_last_value_of_each_metric(tmp_path: Path) -> None:
    recipe = load_recipe(quickstart.RECIPES / "quickstart.yaml")
    with_metrics = MetricsFile(tmp_path / "metrics.jsonl")
    with_metrics.append(1, {"tokens_per_second": 10.0})
    with pytest.raises(NumericalError, match="holds no finite validation_perplexity"):
        quickstart._outcome(recipe, tmp_path)
    with_metrics.append(1, {"validation_perplexity": 300.0, "zero_fraction": 0.3, "flip_rate": 0.2})
    with_metrics.append(2, {"tokens_per_second": 30.0, "validation_perplexity": 200.0, "zero_fraction": 0.4})
    with_metrics.close()
    outcome = quickstart._outcome(recipe, tmp_path)
    assert outcome == quickstart.Outcome(recipe.name, tmp_path, 200.0, 0.4, 0.2, 20.0)


def test_the_corpus_is_the_library_without_what_was_installed_into_it() -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = quickstart._library_sources()
    assert {library / "argparse.py", library / "json" / "decoder.py", library / "sqlite3" / "dump.py"} <= set(files)
    assert not [file for file in files if set(file.relative_to(library).parts) & {"site-packages", "test"}]
    assert files == sorted(files)


@pytest.mark.parametrize(
    ("gpus", "overrides", "ranks", "expected"),
    [
        (0, [], 2, "training on 2 CPU ranks"),
        (1, [], 1, "training on 1 GPU rank"),
        (2, [], 2, "training on 2 GPU ranks"),
        (8, ["device=cpu"], 2, "training on 2 CPU ranks"),
        (1, ["parallel.tensor=1", "parallel.pipeline=1"], 1, "training on 1 GPU rank"),
    ],
)
def test_a_single_gpu_gets_one_rank(
    gpus: int,
    overrides: list[str],
    ranks: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = []

    def launch(arguments: list[str], count: int) -> int:
        started.append(count)
        recipe = load_recipe(arguments[0], arguments[1:])
        assert recipe.parallel.tensor * recipe.parallel.pipeline == count
        return 3

    monkeypatch.setattr(quickstart, "_gpus", lambda: gpus)
    monkeypatch.setattr(quickstart, "_prepare", lambda recipe: 600.0)
    monkeypatch.setattr(quickstart, "launch", launch)
    assert quickstart.run(overrides) == 3
    assert started == [ranks]
    assert expected in capsys.readouterr().out
