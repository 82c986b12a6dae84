"""Runs side by side: recipe keys that differ, metrics at equal tokens and FLOPs, from folders as runs write them."""

import csv
from pathlib import Path

import pytest

from megatron_sbn.analysis.compare import Reading, at_equal, differences, report
from megatron_sbn.cli import main
from megatron_sbn.config import load_recipe
from megatron_sbn.plan.flops import model_flops_per_token
from megatron_sbn.runs.finished_run import read_run
from megatron_sbn.runs.metrics_file import MetricsFile

TINY = Path(__file__).parents[2] / "recipes" / "tiny" / "ternary-6of8.yaml"


def run_folder(path: Path, overrides: tuple[str, ...], every: int, steps: int, loss: float) -> Path:
    """A run that measured its loss, loss / step, at every `every`-th of its steps."""
    path.mkdir()
    (path / "recipe.yaml").write_text(load_recipe(TINY, overrides).to_yaml())
    file = MetricsFile(path / "metrics.jsonl")
    for step in range(every, steps + 1, every):
        file.append(step, {"loss": loss / step, "tokens_per_second": 100.0 * step})
    file.close()
    return path


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """10 samples a step, measured every 4 steps up to 40; and 20 a step, every 3 up to 12."""
    batch = "training.micro_batch_size=10"
    return [
        run_folder(tmp_path / "a", ("training.global_batch_size=10", batch), 4, 40, 80.0),
        run_folder(tmp_path / "b", ("training.global_batch_size=20", batch, "linear.sparsity=4:8"), 3, 12, 60.0),
    ]


def test_recipe_keys_that_differ(folders: list[Path]) -> None:
    assert differences([read_run(folder) for folder in folders]) == [
        ("linear.sparsity", ["6:8", "4:8"]),
        ("training.global_batch_size", ["10", "20"]),
    ]


def test_values_are_shown_without_secrets_and_control_characters(folders: list[Path]) -> None:
    changed = load_recipe(folders[0] / "recipe.yaml", ['tracking.uri="http://me:hush@host"', 'data.train="\\e[2J"'])
    (folders[0] / "recipe.yaml").write_text(changed.to_yaml())
    text = report([read_run(folder) for folder in folders])
    assert "http://***@host" in text
    assert "hush" not in text
    assert "\x1b" not in text


def test_at_equal_tokens_nobody_has_trained_on_more(folders: list[Path]) -> None:
    runs = [read_run(folder) for folder in folders]
    # b's last measurement, 12 steps of 20, are 24 of a's steps.
    tokens = runs[0].tokens(24)
    assert tokens == runs[1].tokens(12) == 24 * 10 * 128
    expected = (tokens, [Reading(24, 80.0 / 24, measured=True), Reading(12, 5.0, measured=True)])
    assert at_equal(runs, "loss", lambda run, step: run.tokens(step)) == expected
    assert at_equal(runs, "validation_loss", lambda run, step: run.tokens(step)) is None


def test_flops_follow_the_sparsity(folders: list[Path]) -> None:
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        dense, sparse = model_flops_per_token(run.recipe)
        assert run.flops(7, sparse=False) == pytest.approx(run.tokens(7) * dense)
        assert run.flops(7, sparse=True) == pytest.approx(run.tokens(7) * sparse)
    # 4:8 saves more than 6:8: 12 steps of b cost less than 24 of a, between whose measurements at 20 and 24 it ends.
    found = at_equal(runs, "loss", lambda run, step: run.flops(step, sparse=True))
    assert found is not None
    budget, (a, b) = found
    assert b == Reading(12, 5.0, measured=True)
    assert budget == runs[1].flops(12, sparse=True)
    assert 20 < a.step < 24
    assert runs[0].flops(1, sparse=True) * a.step == pytest.approx(budget)
    share = (a.step - 20) / 4
    assert a.value == pytest.approx((1 - share) * 80.0 / 20 + share * 80.0 / 24)
    assert not a.measured
    assert str(a).startswith("~")


def test_before_a_runs_first_measurement_there_is_nothing_to_compare(tmp_path: Path) -> None:
    early = read_run(run_folder(tmp_path / "early", (), 1, 2, 1.0))
    late = read_run(run_folder(tmp_path / "late", (), 3, 6, 1.0))
    assert at_equal([early, late], "loss", lambda run, step: run.tokens(step)) is None


def test_phases_change_the_flops_of_a_token(tmp_path: Path) -> None:
    phases = "linear.phases=[{step: 4, sparsity: 4:8}, {step: 9, sparsity: 2:8}]"
    run = read_run(run_folder(tmp_path / "p", (phases,), 1, 3, 1.0))
    per_step = run.tokens(1)
    costs = [model_flops_per_token(run.recipe, step)[1] for step in (0, 4, 9)]
    assert len(set(costs)) == 3
    assert run.flops(4, sparse=True) == pytest.approx(4 * per_step * costs[0])
    expected = per_step * (4 * costs[0] + 5 * costs[1] + 3 * costs[2])
    assert run.flops(12, sparse=True) == pytest.approx(expected)


def test_the_report(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, folders)]) == 0
    text = capsys.readouterr().out
    assert text.strip() == report([read_run(folder) for folder in folders])
    results, different, at_tokens, *rest = (block.splitlines() for block in text.split("\n\n"))
    assert results[0].split() == ["run", "linear", "steps", "tokens", "loss", "perplexity", "zeros", "tokens/s"]
    first, second = (line.split() for line in results[2:])
    assert (first[:3], first[-1]) == (["a", "ternary", "6:8"], "2,200")
    assert (second[:3], second[-1]) == (["b", "ternary", "4:8"], "750")
    column = different[1].split().index("linear.sparsity")
    assert [line.split()[column] for line in different[3:]] == ["6:8", "4:8"]
    assert at_tokens[0] == "at equal tokens"
    assert "loss at 3.072e+04" in at_tokens[1]
    assert "3.3333 (step 24)" in at_tokens[3]
    assert "5 (step 12)" in at_tokens[4]
    assert [block[0] for block in rest] == ["at equal dense-equivalent FLOPs", "at equal sparse-effective FLOPs"]


def test_a_line_a_run_for_a_spreadsheet(folders: list[Path], tmp_path: Path) -> None:
    assert main(["compare", *map(str, folders), "--csv", str(tmp_path / "runs.csv")]) == 0
    with (tmp_path / "runs.csv").open() as file:
        assert [(row["run"], row["sparsity"]) for row in csv.DictReader(file)] == [("a", "6:8"), ("b", "4:8")]


def test_what_is_no_run_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}: is no run folder" in error
    assert error.count("\n") == 1
