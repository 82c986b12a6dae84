"""A study's page, table and figures, from folders as runs write them."""

import csv
import re
from pathlib import Path

import pytest

from megatron_sbn.analysis.figures import Curve, Scaling
from megatron_sbn.analysis.report import collapse_point, curves, read_study, scalings, settings_of
from megatron_sbn.cli import main
from megatron_sbn.config import load_recipe
from megatron_sbn.runs.folder import TRACKING
from megatron_sbn.runs.metrics_file import MetricsFile
from megatron_sbn.runs.tracking_record import RunRecord, RunRecordFile, new_key

TINY = Path(__file__).parents[2] / "recipes" / "tiny" / "base.yaml"
STEPS = 4
# Perplexity of one seed, and how much higher the other's is.
PERPLEXITY = {
    "ternary": {8: 100.0, 6: 104.0, 4: 108.0, 2: 120.0},
    "dense": {8: 90.0, 6: 95.0, 4: 104.0, 2: 150.0},
}
SEEDS = {1: 0.0, 2: 6.0}


def run_folder(study: Path, weight_format: str, n: int, seed: int, steps: int = STEPS, *changes: str) -> Path:
    folder = study / re.sub(r"[^\w.=-]", "", "-".join([weight_format, str(n), f"seed{seed}", *changes]))
    folder.mkdir(parents=True)
    overrides = (f"linear.weight_format={weight_format}", f"linear.sparsity={n}:8", f"training.seed={seed}", *changes)
    recipe = load_recipe(TINY, (*overrides, f"training.steps={STEPS}", "optimizer.lr_decay_steps=20"))
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    file = MetricsFile(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        file.append(step, {"loss": 8.0 - step / 10 - n / 100, "tokens_per_second": 1000.0 + step})
    if steps == STEPS:
        file.append(STEPS, {"validation_perplexity": PERPLEXITY[weight_format][n] + SEEDS[seed], "zero_fraction": 0.3})
    file.close()
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "n-of-8"
    for weight_format, by_n in PERPLEXITY.items():
        for n in by_n:
            for seed in SEEDS:
                run_folder(folder, weight_format, n, seed)
    return folder


def test_curves_are_means_and_ranges_over_seeds(study: Path) -> None:
    run_folder(study, "ternary", 6, 3, steps=2)  # not finished: in no curve
    ternary, dense = curves(read_study(study), 8)
    assert (ternary.weight_format, ternary.group, ternary.n) == ("ternary", 8, (8, 6, 4, 2))
    assert ternary.mean == (103.0, 107.0, 111.0, 123.0)
    assert ternary.low == (100.0, 104.0, 108.0, 120.0)
    assert ternary.high == (106.0, 110.0, 114.0, 126.0)
    assert dense.mean == (93.0, 98.0, 107.0, 153.0)
    scaled = dense.normalized()
    assert scaled is not None
    assert scaled.mean == pytest.approx((1.0, 98 / 93, 107 / 93, 153 / 93))


def test_runs_that_differ_in_more_than_the_seed_are_curves_of_their_own(tmp_path: Path) -> None:
    for rate in ("0.001", "0.002"):
        for n, seed in ((8, 1), (8, 2), (6, 1)):
            run_folder(tmp_path, "ternary", n, seed, STEPS, f"optimizer.lr={rate}", f"training.log_interval={seed}")
    run_folder(tmp_path, "dense", 8, 1)
    made = curves(read_study(tmp_path), 8)
    assert [(curve.name, curve.n) for curve in made] == [
        ("ternary, lr 0.001", (8, 6)),
        ("ternary, lr 0.002", (8, 6)),
        ("dense FP32", (8,)),
    ]
    assert (made[0].mean, made[0].low, made[0].high) == ((103.0, 104.0), (100.0, 104.0), (106.0, 104.0))
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report" / "index.md").read_text()
    assert "| ternary, lr 0.001 | / 8:8 | ternary, lr 0.002 | / 8:8 | dense FP32 | / 8:8 |" in page


def test_a_run_with_phases_goes_by_its_last_and_is_no_baseline(study: Path) -> None:
    """Annealed 8:8 -> 4:8, and dense -> ternary 6:8; the recipe's first words are those of a baseline."""
    annealed = "linear.phases=[{step: 2, sparsity: '4:8'}]"
    late = "linear.phases=[{step: 3, weight_format: ternary, sparsity: '6:8', activation_bits: 8}]"
    run_folder(study, "ternary", 8, 1, STEPS, annealed)
    run_folder(study, "dense", 8, 1, STEPS, late)
    before = curves([run for run in read_study(study) if not run.schedule], 8)
    made = {curve.name: curve for curve in curves(read_study(study), 8)}
    assert [made[curve.name] for curve in before] == before  # they change no other curve
    own = made["ternary 8:8 -> ternary 4:8 at step 2"]
    assert (own.n, own.mean, own.baseline) == ((4,), (100.0,), 103.0)
    scaled = own.normalized()
    assert scaled is not None
    assert scaled.mean == (100 / 103,)
    assert made["dense 8:8 -> ternary 6:8 at step 3"].n == (6,)
    assert main(["report", str(study)]) == 0
    with (study / "report" / "runs.csv").open() as file:
        rows = {row["schedule"]: row for row in csv.DictReader(file) if row["schedule"]}
    assert rows["ternary 8:8 -> ternary 4:8 at step 2"]["sparsity"] == "4:8"
    assert rows["dense 8:8 -> ternary 6:8 at step 3"]["weight_format"] == "ternary"


def test_every_finished_run_is_drawn_or_named(study: Path) -> None:
    folder = run_folder(study, "ternary", 2, 1, STEPS, "linear.sparsity=2:4")
    run_folder(study, "dense", 8, 2, STEPS, "linear.sparsity=1:4")
    assert main(["report", str(study)]) == 0
    page = (study / "report" / "index.md").read_text()
    assert f"Not in the curves, which are over N of N:8: {folder.name} (ternary 2:4)." in page
    assert page.count("Not in the curves") == 2


def test_a_setting_fits_a_legend_or_is_a_runs_name(tmp_path: Path) -> None:
    long = "/somewhere/far/away/in/a/deep/folder/of/a/shared/file/system"
    for index, name in enumerate(("alpha", "beta")):
        folder = run_folder(tmp_path, "ternary", 8, 1, STEPS, f"data.train=data/{index}")
        text = (folder / "recipe.yaml").read_text().replace(f"data/{index}", f"{long}/{index}/{long}")
        (folder / "recipe.yaml").write_text(text)
        folder.rename(tmp_path / name)
    runs = read_study(tmp_path)
    assert settings_of(runs, re.compile(r"data\..+")) == ["as alpha", "as beta"]


def test_a_perplexity_of_an_earlier_step_is_not_the_final_one(tmp_path: Path) -> None:
    run_folder(tmp_path, "ternary", 8, 1)
    file = MetricsFile(run_folder(tmp_path, "ternary", 8, 2, STEPS - 1) / "metrics.jsonl")
    file.append(STEPS - 1, {"validation_perplexity": 900.0})
    file.append(STEPS, {"loss": 7.0})  # its validation is not done yet
    file.close()
    (curve,) = curves(read_study(tmp_path), 8)
    assert curve.mean == (100.0,)


def test_the_collapse_point_is_the_first_n_above_ten_percent(study: Path) -> None:
    ternary, dense = curves(read_study(study), 8)
    assert collapse_point(ternary) == 2  # 123/103; 111/103 is 1.078
    assert collapse_point(dense) == 4  # 107/93 is 1.15
    means = (100.0, 110.0)
    assert collapse_point(Curve("ternary", "ternary", 8, (8, 4), means, means, means, "", 100.0)) is None
    assert collapse_point(Curve("ternary", "ternary", 8, (6, 4), means, means, means)) is None


def test_the_report(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(study, "ternary", 6, 3, steps=2)
    assert main(["report", str(study)]) == 0
    output = study / "report"
    assert str(output / "index.md") in capsys.readouterr().out
    page = (output / "index.md").read_text()
    assert "17 runs, 16 finished; 0.00819M tokens each." in page
    assert "Not finished: ternary-6-seed3." in page
    assert "| N:M | ternary | / 8:8 | dense FP32 | / 8:8 |" in page
    assert "| 6:8 | 107.00 | 1.039 | 98.00 | 1.054 |" in page
    assert "- dense FP32: perplexity first exceeds 1.10 of 8:8 at 4:8." in page
    for name in ("perplexity.png", "loss.png"):
        assert f"({name})" in page
        assert (output / name).read_bytes().startswith(b"\x89PNG")
        assert (output / name).stat().st_size > 20_000
    with (output / "runs.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert len(rows) == 17
    row = rows["dense-2-seed2"]
    assert (row["weight_format"], row["sparsity"], row["seed"], row["finished"]) == ("dense", "2:8", "2", "True")
    assert (float(row["validation_perplexity"]), float(row["tokens_per_second"])) == (156.0, 1002.5)
    assert rows["ternary-6-seed3"]["finished"] == "False"
    assert rows["ternary-6-seed3"]["validation_perplexity"] == ""
    assert main(["report", str(study)]) == 0  # its own folder is no run


def test_the_folder_that_one_is_in_has_its_name(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(study)
    assert main(["report", "."]) == 0
    assert (study / "report" / "index.md").read_text().startswith("# n-of-8\n")
    monkeypatch.chdir(study / "dense-8-seed1")
    capsys.readouterr()
    assert main(["compare", ".", "../dense-6-seed1"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:4]
    assert [row.split()[0] for row in rows] == ["dense-8-seed1", "dense-6-seed1"]


def test_a_study_without_a_dense_run_has_no_normalized_column(tmp_path: Path) -> None:
    run_folder(tmp_path / "s", "ternary", 6, 1)
    run_folder(tmp_path / "s", "ternary", 4, 1)
    assert main(["report", str(tmp_path / "s"), "--output", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "index.md").read_text()
    assert "| 6:8 | 104.00 | - |" in page
    assert "- ternary: no finished run at 8:8 without phases, so nothing to tell a collapse by." in page


@pytest.mark.parametrize("place", ["file", "file/x", "a\0b", "x" * 300])
def test_a_page_that_cannot_be_written_is_one_line(
    study: Path, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["report", str(study), "--output", str(tmp_path / place)]) == 2
    errors = capsys.readouterr().err
    assert "cannot be made a folder: " in errors
    assert errors.count("\n") == 1


def test_an_empty_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path}: holds no run folders" in capsys.readouterr().err


def test_formats_are_not_averaged_into_one_speed(tmp_path: Path) -> None:
    for weight_format, ranks, speed in (
        ("ternary", 1, 90.0),
        ("ternary", 2, 160.0),
        ("dense", 1, 110.0),
        ("dense", 2, 200.0),
    ):
        folder = tmp_path / f"{weight_format}-{ranks}"
        folder.mkdir(parents=True)
        changes = (f"linear.weight_format={weight_format}", f"training.global_batch_size={16 * ranks}")
        (folder / "recipe.yaml").write_text(load_recipe(TINY, changes).to_yaml())
        file = MetricsFile(folder / "metrics.jsonl")
        file.append(1, {"tokens_per_second": speed})
        file.close()
        record = RunRecord(new_key(), folder.name, "e", "sqlite:///x.db", 0.0, {}, {"ranks": str(ranks)}, [])
        RunRecordFile(folder / TRACKING, record).update(status="FINISHED")
    layout = "tensor 1 x pipeline 1, ZeRO-1, weight_format"
    assert scalings(read_study(tmp_path)) == [
        Scaling(f"{layout} dense", (1, 2), (110.0, 200.0)),
        Scaling(f"{layout} ternary", (1, 2), (90.0, 160.0)),
    ]


def test_speed_over_ranks(tmp_path: Path) -> None:
    study = tmp_path / "weak"
    for ranks, tensor, speed in ((1, 1, 100.0), (2, 1, 180.0), (4, 1, 300.0), (2, 2, 90.0)):
        folder = study / f"r{ranks}-t{tensor}"
        folder.mkdir(parents=True)
        recipe = load_recipe(TINY, (f"parallel.tensor={tensor}", "training.steps=2", "optimizer.lr_decay_steps=30"))
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        file = MetricsFile(folder / "metrics.jsonl")
        file.append(1, {"loss": 8.0, "tokens_per_second": speed})
        file.append(2, {"loss": 7.0, "tokens_per_second": speed})
        file.close()
        record = RunRecord(new_key(), folder.name, "e", "sqlite:///x.db", 0.0, {}, {"ranks": str(ranks)}, [])
        RunRecordFile(folder / TRACKING, record).update(status="FINISHED")
    (scaling,) = scalings(read_study(study))  # tensor 2 ran on one number of ranks: no curve
    assert scaling == Scaling("tensor 1 x pipeline 1, ZeRO-1", (1, 2, 4), (100.0, 180.0, 300.0))
    assert scaling.efficiency == (1.0, 0.9, 0.75)
    assert main(["report", str(study)]) == 0
    page = (study / "report" / "index.md").read_text()
    assert "| tensor 1 x pipeline 1, ZeRO-1 | 4 | 300 | 75 | 75% |" in page
    assert (study / "report" / "scaling.png").stat().st_size > 20_000
