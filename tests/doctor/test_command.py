"""`sbn doctor`: what it says without ranks, the tiny model that keeps a layout, and comparisons that can fail."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from megatron_sbn.cli import main
from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.config.validation import min_world_size, validate_world_size
from megatron_sbn.doctor import command, layouts, report, trials
from megatron_sbn.doctor.tiny_recipe import one_rank, tiny_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
QWEN = str(RECIPES / "qwen2.5-0.5b" / "ternary-6of8.yaml")
QUICK = str(RECIPES / "quickstart.yaml")
TENSOR2 = "parallel.tensor=2"
OVERRIDES: tuple[tuple[str, ...], ...] = (
    (),
    (TENSOR2, "parallel.pipeline=2"),
    (TENSOR2, "parallel.pipeline=4", "parallel.virtual_pipeline=3"),
    ("parallel.pipeline=4", "parallel.num_layers_in_first_pipeline_stage=3"),
    (TENSOR2, "parallel.zero_stage=3", "linear.sparsity=2:4"),
    ("linear.weight_format=dense", "linear.sparsity=7:16", "model.hidden_size=2688", "model.kv_channels=32"),
    ("linear.phases=[{step: 5, sparsity: 3:8}, {step: 9, sparsity: 2:4}]", "model.bf16=false"),
    ("model.share_embeddings_and_output_weights=true", "model.add_qkv_bias=true", "linear.backward=int8"),
    ("model.num_moe_experts=8", "parallel.expert=4"),
)


@pytest.mark.parametrize("overrides", OVERRIDES, ids=str)
def test_the_tiny_model_keeps_the_layout(overrides: tuple[str, ...]) -> None:
    recipe = load_recipe(QWEN, list(overrides))
    ranks = min_world_size(recipe)
    tiny = tiny_recipe(recipe, ranks // (recipe.parallel.tensor * recipe.parallel.pipeline))
    validate_world_size(tiny, ranks)
    assert tiny.linear == recipe.linear
    assert (recipe.device, tiny.device) == ("cuda", "auto")
    kept = ("tensor", "pipeline", "virtual_pipeline", "expert", "sequence", "zero_stage")
    assert [getattr(tiny.parallel, k) for k in kept] == [getattr(recipe.parallel, k) for k in kept]
    same = ("share_embeddings_and_output_weights", "add_qkv_bias", "bf16", "num_moe_experts", "rotary_base")
    assert [getattr(tiny.model, k) for k in same] == [getattr(recipe.model, k) for k in same]
    ratio = recipe.model.num_attention_heads // recipe.model.query_groups
    assert tiny.model.num_attention_heads == ratio * tiny.model.query_groups
    assert tiny.model.hidden_size <= 112
    assert tiny.model.num_layers <= 16
    alone = one_rank(tiny)
    validate_world_size(alone, 1)
    assert alone.model == tiny.model
    assert alone.training == tiny.training


def test_every_layout_of_the_table_can_be_trained() -> None:
    cuts = layouts.candidates(load_recipe(QUICK))
    assert len(cuts) == 15
    for ranks, recipe in cuts.values():
        validate_world_size(recipe, ranks)
    assert all(recipe.model.num_layers == 4 for _, recipe in cuts.values())
    experts = layouts.candidates(load_recipe(RECIPES / "quickstart-moe.yaml"))
    assert "expert 2" in experts
    assert "data 2, ZeRO-3" not in experts


def test_without_ranks_it_says_what_the_recipe_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", QWEN, TENSOR2, "parallel.pipeline=2"]) == 2
    said = capsys.readouterr()
    assert "a replica takes 4 ranks" in said.out
    assert "4, 8, 16, 32, 64, 128, 256, 512" in said.out
    assert said.err == "sbn: data.train: data/corpus-train.idx: no such token shard; `sbn prepare` writes one\n"


def test_what_is_compared_needs_no_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "check_ranks", lambda *_: True)
    assert main(["doctor", QWEN, "--ranks"]) == 0
    assert "not there yet: data.train: data/corpus-train.idx: no such token shard" in capsys.readouterr().out


def test_a_batch_of_any_size_is_looked_at_in_a_moment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", QWEN, f"training.global_batch_size={2**52}", "training.micro_batch_size=1"]) == 2
    assert f"its batch of {2**52} fills: 1, 2, 4, 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((TENSOR2, "parallel.pipeline=2", "--ranks", "3"), "needs a multiple of 4 ranks, and 3 were started"),
        (("parallel.pipeline=2", "parallel.zero_stage=3"), "parallel.zero_stage = 3 with parallel.pipeline = 2"),
        (("training.global_batch_size=6",), "training.global_batch_size = 6 is not a multiple of"),
        (
            ("--json", "report.json"),
            "--json report.json takes the comparison of --ranks, --layouts or --engines; give one",
        ),
        (("--steps", "3"), "--steps 3 goes with --layouts or --engines"),
        (("--ranks", "--layouts", "--json", "report.json"), "--json report.json takes the comparison of"),
    ],
)
def test_a_bad_recipe_is_one_line_and_2(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", QWEN, *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_ranks_that_compute_the_same_are_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert main(["doctor", QWEN, TENSOR2, "--ranks", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "equal"
    expected = json.loads(file.read_text())
    assert expected["equal"] is True
    lines = {line["name"]: line for line in expected["tensors"]}
    kinds = [name.rpartition(".")[2] for name in lines]
    assert {kind: kinds.count(kind) for kind in report.KINDS} == dict.fromkeys(report.KINDS[:-1], 8) | {"hidden": 1}
    assert all(line["ours"] == line["theirs"] for name, line in lines.items() if name != "grad norm")
    assert len(lines["hidden"]["ours"]) == 64
    assert expected["bytes"]["tensor.all_gather"] > 0
    for kind in report.KINDS:
        assert f"\n{kind} " in out


def test_a_comparison_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        command, "run_trials", lambda cuts, steps: {name: report.Trial({}, [1.0], [1.0], []) for name in cuts}
    )
    file = tmp_path / "nowhere" / "report.json"
    assert main(["doctor", QWEN, TENSOR2, "--ranks", "--json", str(file)]) == 2
    error = capsys.readouterr().err
    assert f"{file.parent}" in error
    assert error.count("\n") == 1


def test_ranks_that_compute_something_else_are_different(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A single rank of another seed, in place of one that is not."""

    def other(recipe: Recipe) -> Recipe:
        values = one_rank(recipe).plain()
        values["training"]["seed"] += 1
        return Recipe.model_validate(values)

    monkeypatch.setattr(command, "one_rank", other)
    assert main(["doctor", QUICK, "parallel.tensor=1", "--ranks", "1"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "DIFFERENT"
    assert "differs: decoder.layers.0.mlp.linear_fc1.codes by" in out
    assert "differs: hidden by" in out


@pytest.mark.slow
def test_a_table_of_layouts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    every = layouts.candidates
    kept = (layouts.SPREAD, "pipeline 2, 3 layers and 1", "data 2, ZeRO-3")
    monkeypatch.setattr(command, "candidates", lambda recipe: {k: v for k, v in every(recipe).items() if k in kept})
    assert main(["doctor", QUICK, "--layouts", "--steps", "2"]) == 0
    lines = (re.split(r"  +", line) for line in capsys.readouterr().out.splitlines())
    rows = {name: cells for name, *cells in lines}
    assert set(kept) <= set(rows)
    for name in kept:
        assert rows[name][:3] == ["equal"] * 3
    assert int(rows["data 2, ZeRO-3"][-1].replace(",", "")) > 0


def test_ranks_that_do_not_finish_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trials, "START_SECONDS", -10.0)
    assert main(["doctor", QUICK, "--ranks"]) == 1
    assert "sbn: single: rank 0 did not finish within" in capsys.readouterr().err


def trial(**changes: torch.Tensor) -> report.Trial:
    tensors = {
        "a.codes": torch.ones(2, 4, dtype=torch.int8),
        "a.x_q": torch.ones(3, 4, dtype=torch.int8),
        "hidden": torch.linspace(0.0, 1.0, 8).view(2, 4),
    }
    return report.Trial(tensors | changes, [2.0], [1.0], [{}])


def verdicts(recipe: Recipe, ours: report.Trial) -> dict[str, bool]:
    return {line.name: line.equal for line in report.compare(recipe, ours, trial())}


def test_one_bit_of_a_hidden_state_is_a_difference_where_bits_are_promised() -> None:
    hidden = torch.linspace(0.0, 1.0, 8).view(2, 4)
    hidden[1, 2] = torch.nextafter(hidden[1, 2], torch.tensor(2.0))
    ternary = load_recipe(QUICK)
    dense = load_recipe(QUICK, ["linear.weight_format=dense", "linear.sparsity=8:8"])
    mixture = load_recipe(RECIPES / "quickstart-moe.yaml")
    assert all(verdicts(ternary, trial()).values())
    assert verdicts(ternary, trial(hidden=hidden)) == {
        "a.codes": True, "a.x_q": True, "hidden": False, "loss": True, "grad norm": True,
    }  # fmt: skip
    assert verdicts(dense, trial(hidden=hidden))["hidden"]
    assert verdicts(mixture, trial(hidden=hidden))["hidden"]
    assert not verdicts(dense, trial(hidden=hidden + 1e-3))["hidden"]
    codes = torch.ones(2, 4, dtype=torch.int8)
    codes[0, 0] = 0
    assert not verdicts(dense, trial(**{"a.codes": codes}))["a.codes"]


def test_a_missing_tensor_a_loss_and_a_norm_are_differences() -> None:
    recipe = load_recipe(QUICK)
    fewer = report.Trial({"hidden": trial().tensors["hidden"]}, [2.0], [1.0], [{}])
    assert not verdicts(recipe, fewer)["a.codes"]
    assert not verdicts(recipe, dataclasses.replace(trial(), losses=[2.00001]))["loss"]
    assert not verdicts(recipe, dataclasses.replace(trial(), grad_norms=[1.0001]))["grad norm"]


def test_replicas_that_differ_are_reported(tmp_path: Path) -> None:
    from megatron_sbn.doctor.logical_tensors import TensorShard, write_shards
    from megatron_sbn.parallel.shard import unsharded

    for rank, value in enumerate((1.0, 2.0)):
        write_shards(
            tmp_path / f"rank-{rank}.safetensors", {"w": TensorShard(unsharded((3,)), torch.full((3,), value))}
        )
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps({"losses": [1], "grad_norms": [1], "bytes": {}}))
    with pytest.raises(ValueError, match="w: the replica of rank 1 differs"):
        report.read_trial(tmp_path, 2)
