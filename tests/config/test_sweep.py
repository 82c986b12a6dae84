"""Sweep files expand to named recipes, each of which can be trained on its ranks; mistakes are one line."""

from pathlib import Path

import pytest

from megatron_sbn import launch
from megatron_sbn.cli import main
from megatron_sbn.config import load_recipe
from megatron_sbn.config.sweep import frozen, load_sweep
from megatron_sbn.config.validation import min_world_size, validate_world_size
from megatron_sbn.errors import RecipeError
from megatron_sbn.launch import many
from megatron_sbn.runs.status import write_status

RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = ("tiny", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b")
FORMATS = ("dense-8of8", "dense-6of8", "dense-2of4", "ternary-8of8", "ternary-6of8", "ternary-2of4")
SWEEPS = {
    "formats-tiny": 6,
    "n-of-8-tiny": 28,
    "n-of-8-qwen2.5-0.5b": 14,
    "learning-rates-qwen2.5-0.5b": 8,
    "scaling-tiny": 6,
    "seeds-qwen2.5-0.5b": 4,
    "strong-scaling-qwen2.5-3b": 20,
    "weak-scaling-qwen2.5-0.5b": 16,
}
TINY = RECIPES / "sweeps" / "n-of-8-tiny.yaml"


def test_every_recipe_can_be_trained_on_its_own_layout() -> None:
    files = [path for path in sorted(RECIPES.rglob("*.yaml")) if path.parent.name != "sweeps"]
    assert len(files) == 3 + len(SIZES) * (len(FORMATS) + 1)
    names = []
    for path in files:
        recipe = load_recipe(path)
        validate_world_size(recipe, min_world_size(recipe))
        names.append(recipe.name)
    assert len(set(names)) == len(files)


@pytest.mark.parametrize("size", SIZES)
def test_a_variant_is_its_diff(size: str) -> None:
    base = load_recipe(RECIPES / size / "base.yaml")
    for name in FORMATS:
        text = (RECIPES / size / f"{name}.yaml").read_text()
        assert text.count("\n") <= 7
        recipe = load_recipe(RECIPES / size / f"{name}.yaml")
        weight_format, sparsity = name.split("-")
        n, m = (int(part) for part in sparsity.split("of"))
        assert (recipe.name, recipe.linear.weight_format, recipe.linear.sparsity) == (
            f"{size}-{name}",
            weight_format,
            (n, m),
        )
        assert recipe.model == base.model
        assert recipe.training == base.training


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ("qwen2.5-0.5b", (24, 896, 4864, 14, 2)),
        ("qwen2.5-1.5b", (28, 1536, 8960, 12, 2)),
        ("qwen2.5-3b", (36, 2048, 11008, 16, 2)),
    ],
)
def test_shapes_are_qwens(size: str, shape: tuple[int, ...]) -> None:
    recipe = load_recipe(RECIPES / size / "base.yaml")
    model, training = recipe.model, recipe.training
    assert (
        model.num_layers,
        model.hidden_size,
        model.ffn_hidden_size,
        model.num_attention_heads,
        model.query_groups,
    ) == shape
    assert (model.vocab_size, model.seq_length, model.rotary_base) == (151936, 2048, 1000000)
    assert training.global_batch_size * model.seq_length == 1048576


def test_every_sweep_expands(tmp_path: Path) -> None:
    files = sorted(path.stem for path in (RECIPES / "sweeps").glob("*.yaml"))
    assert files == sorted(SWEEPS)
    for name, count in SWEEPS.items():
        study = load_sweep(RECIPES / "sweeps" / f"{name}.yaml")
        assert (study.name, len(study.variants)) == (name, count)
        for variant in study.variants:
            file = tmp_path / f"{variant.name}.yaml"
            file.write_text(variant.recipe.to_yaml())
            assert load_recipe(file) == variant.recipe


@pytest.mark.parametrize("name", SWEEPS)
def test_a_frozen_sweep_is_the_same_sweep(name: str, tmp_path: Path) -> None:
    path = RECIPES / "sweeps" / f"{name}.yaml"
    for file, text in frozen(path).items():
        (tmp_path / file).write_text(text)
    copy = load_sweep(tmp_path / "sweep.yaml")
    assert (copy.name, copy.variants) == (name, load_sweep(path).variants)


def test_names_labels_and_order() -> None:
    study = load_sweep(TINY)
    first, last = study.variants[0], study.variants[-1]
    assert first.name == "n-of-8-tiny-ternary-8of8-seed-1234"
    assert last.name == "n-of-8-tiny-bf16-2of8-seed-1235"
    assert study.variants[1].labels == {"format": "ternary", "linear.sparsity": "8of8", "training.seed": "seed-1235"}
    assert last.recipe.name == last.name
    assert (last.recipe.linear.weight_format, last.recipe.linear.sparsity, last.recipe.model.bf16) == (
        "dense",
        (2, 8),
        True,
    )
    assert last.recipe.training.seed == 1235
    sparsities = [variant.recipe.linear.sparsity[0] for variant in study.variants]
    assert sparsities == [n for _ in range(2) for n in range(8, 1, -1) for _ in range(2)]
    again = load_recipe(study.base, last.overrides)
    assert again == last.recipe


def test_ranks_of_a_scaling_study() -> None:
    study = load_sweep(RECIPES / "sweeps" / "weak-scaling-qwen2.5-0.5b.yaml")
    assert {variant.ranks for variant in study.variants} == {8, 16, 32, 64}
    assert all(v.recipe.training.global_batch_size == 64 * v.ranks for v in study.variants)
    assert all(v.recipe.training.steps == 60 for v in study.variants)


BASE = f"name: s\nrecipe: {RECIPES / 'tiny' / 'base.yaml'}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: s\nrecipe: nowhere.yaml\naxes: {training.seed: [1]}\n", "nowhere.yaml: cannot read this recipe"),
        (BASE + "axes: {}\n", "axes: Dictionary should have at least 1 item"),
        (BASE + "axis: {training.seed: [1]}\n", "axes: Field required"),
        (BASE + "axes: {training.seed: []}\n", "axes.training.seed is empty"),
        (
            BASE + "axes: {" + ", ".join(f"a{i}: [{', '.join(map(str, range(10)))}]" for i in range(12)) + "}\n",
            "its axes make 1,000,000,000,000 recipes, at most 1,000",
        ),
        (
            BASE + "axes: {training.seeed: [1]}\n",
            "s-seeed-1: training.seeed is not a recipe key; did you mean training.seed?",
        ),
        (BASE + "axes: {training.seed: [1, 1]}\n", "two recipes would be called s-seed-1"),
        (BASE + "axes: {linear.sparsity: ['6:8', '6:9']}\n", "s-6of9: linear.sparsity = 6:9"),
        (BASE + "axes: {ranks: [3], training.seed: [1]}\n", "s-ranks-3-seed-1: training.global_batch_size = 16"),
        (BASE + "set: {name: mine}\naxes: {training.seed: [1]}\n", "sweep.yaml: name: every recipe of a sweep has one"),
        (BASE + "axes: {run_dir: [here]}\n", "sweep.yaml: run_dir: every recipe of a sweep has one of its own"),
        (BASE + "axes: {ranks: [many]}\n", "ranks = 'many' is not a number of ranks"),
        (BASE + "axes: {data.tokenizer: ['a/b']}\n", "'tokenizer-a/b' is no name for a run"),
        ("- a list\n", "a sweep is a mapping"),
        ("name: [\n", "not valid YAML"),
    ],
)
def test_mistakes_are_one_line_and_2(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    assert main(["sweep", "list", str(file)]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_list_and_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "list", str(TINY)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 28
    assert lines[2].split()[:4] == ["2", "n-of-8-tiny-ternary-7of8-seed-1234", "1", "rank"]
    assert main(["sweep", "write", str(TINY), "--output", str(tmp_path / "made")]) == 0
    written = sorted((tmp_path / "made").glob("*.yaml"))
    assert len(written) == 28
    variants = {variant.name: variant.recipe for variant in load_sweep(TINY).variants}
    for path in written:
        assert load_recipe(path) == variants[path.stem]


def test_no_recipe_with_a_password_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(BASE + "set: {tracking.uri: 'http://me:hush@host'}\naxes: {training.seed: [1]}\n")
    assert main(["sweep", "write", str(sweep), "--output", str(tmp_path / "made")]) == 2
    expected = capsys.readouterr().err
    assert f"tracking.uri = http://***@host holds a password, which would be kept in {tmp_path / 'made'}" in expected
    assert not (tmp_path / "made").exists()


def test_run_trains_one_recipe_in_its_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[list[str], int]] = []

    def start(arguments: list[str], ranks: int) -> int:
        started.append((arguments, ranks))
        return 0

    monkeypatch.setattr(launch, "launch", start)
    monkeypatch.setattr("megatron_sbn.data.data_check.warn_of_data", lambda _: None)  # the shards are not there
    runs = tmp_path / "a: b #2"  # in YAML a mapping, and a comment
    assert main(["sweep", "run", str(TINY), "--number", "5", "--folder", str(runs)]) == 0
    ((arguments, ranks),) = started
    variant = load_sweep(TINY).variants[5]
    assert ranks == 1
    folder = runs / "n-of-8-tiny" / variant.name
    assert load_recipe(arguments[0], arguments[1:]) == variant.recipe.model_copy(update={"run_dir": str(folder)})


def test_all_that_are_not_finished_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third, *_ = load_sweep(TINY).variants
    done, shorter = tmp_path / "n-of-8-tiny" / first.name, tmp_path / "n-of-8-tiny" / second.name
    for folder, step in ((done, first.recipe.training.steps), (shorter, 1)):
        folder.mkdir(parents=True)
        write_status(folder, "FINISHED", 0, step)
    given = {}

    def run_all(commands: dict[str, many.Command], at_most: int, _: object) -> dict[str, many.Outcome]:
        given.update(commands)
        assert at_most == 3
        return dict.fromkeys(commands, many.Outcome(0)) | {
            second.name: many.Outcome(3, "step 2: loss is nan"),
            third.name: many.Outcome(75, begun=False),
        }

    monkeypatch.setattr(many, "run_all", run_all)
    assert main(["sweep", "run", str(TINY), "--all", "--at-most", "3", "--folder", str(tmp_path)]) == 3
    assert len(given) == 27
    assert first.name not in given
    assert given[second.name].ranks == 1
    assert given[second.name].words[3:] == ["sweep", "run", str(TINY), "--number", "1", "--folder", str(tmp_path)]
    out = capsys.readouterr().out
    assert f"finished already: {first.name}" in out
    assert "28 recipes: 26 finished, 2 not" in out
    assert f"{second.name}: status 3: step 2: loss is nan" in out
    assert f"{third.name}: not begun" in out


def test_a_number_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "run", str(TINY), "--number", "28"]) == 2
    assert "has recipes 0 to 27" in capsys.readouterr().err
    with pytest.raises(RecipeError):
        load_sweep("nowhere.yaml")
