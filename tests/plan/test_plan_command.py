"""`sbn plan`: what it prints, ranks and refuses. That its figures are true is distributed/test_plan.py's business."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from time_limit import LIMIT_SECONDS

from megatron_sbn.cli import main
from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.config.validation import validate_recipe, validate_world_size
from megatron_sbn.errors import RecipeError
from megatron_sbn.plan.comm_bytes import bytes_of_all_ranks
from megatron_sbn.plan.command import machines_of
from megatron_sbn.plan.hardware import CPU, ON_CUDA, known_device
from megatron_sbn.plan.memory import rank_memory
from megatron_sbn.plan.search import Machines, candidate, choose
from megatron_sbn.plan.shapes import Layout, model_parameters
from megatron_sbn.plan.step_time import duration, link, operations

QWEN3B = str(Path(__file__).parents[2] / "recipes" / "qwen2.5-3b" / "ternary-6of8.yaml")


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe(QWEN3B, overrides)


def h200(nodes: int = 4) -> Machines:
    return machines_of("h200", nodes, 8)


def test_it_needs_no_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = None; from megatron_sbn.cli import main; "
        f"sys.exit(main(['plan', {QWEN3B!r}, '--nodes', '4', '--device', 'h200']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Layout TP2 PP1 DP16 ZeRO-1" in done.stdout


def test_parameters_are_those_of_qwen() -> None:
    kinds = model_parameters(recipe_of())
    vocabulary = 151936 * 2048
    layer = 2048 * (2048 + 2 * 2 * 128) + 2048 * 2048 + 3 * 2048 * 11008
    assert kinds == {
        "embedding": vocabulary,
        "head": vocabulary,
        "attention and MLP projections": 36 * layer,
        "experts": 0,
        "routers": 0,
        "norms and biases": (2 * 36 + 1) * 2048,
    }


def test_the_page_and_its_json_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    arguments = ["plan", QWEN3B, "parallel.pipeline=2", "--nodes", "4", "--device", "h200", "--json", str(file)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert printed.isascii()
    assert max(len(line) for line in printed.splitlines()) <= 140
    parts = report["memory"]
    lasting, passes, update = (sum(parts[name].values()) for name in ("lasting", "passes", "update"))
    assert parts["total"] == pytest.approx(lasting + max(passes, update))
    assert f"{parts['total'] / 2**30:,.2f}" in printed
    assert sum(report["seconds"].values()) == pytest.approx(report["layout"]["step_seconds"])
    assert f"{report['layout']['tokens_per_second']:,.0f} tokens/s" in printed
    assert (
        report["layout"]["tensor"] * report["layout"]["pipeline"] * report["layout"]["data"] == report["devices"] == 32
    )
    assert "not measured" in printed
    for group in ("tensor", "pipeline", "data"):
        assert report["comm_bytes"]["all"][group] > 0


def test_layouts_are_feasible_fit_and_are_ranked() -> None:
    recipe, machines = recipe_of(), h200()
    choice = choose(recipe, machines)
    assert len(choice.fitting) > 5
    for one in choice.fitting:
        validate_recipe(one.layout.recipe)
        validate_world_size(one.layout.recipe, 32)
        assert one.memory.total <= machines.usable
    steps = [one.duration.step for one in choice.fitting]
    assert steps == sorted(steps)
    assert len({one.name for one in choice.fitting}) == len(steps)


def test_what_does_not_fit_is_counted_with_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    small = machines_of("h100", 1, 8)
    choice = choose(recipe_of("model.num_layers=72"), small)
    assert choice.fitting
    assert choice.too_large
    for over, one in choice.too_large:
        assert over == pytest.approx(one.memory.total - small.usable)
        assert over > 0
    assert main(["plan", QWEN3B, "model.num_layers=72", "--nodes", "1", "--device", "h100"]) == 0
    assert f"{len(choice.too_large)} do not fit; the nearest, {choice.too_large[0][1].name}" in capsys.readouterr().out


def test_where_nothing_fits_one_line_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", QWEN3B, "parallel.tensor=1", "--nodes", "1", "--gpus-per-node", "1", "--device", "a100"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "lacks" in captured.err
    assert "optimizer.cpu_offload=true" in captured.err
    assert main([*arguments, "optimizer.cpu_offload=true"]) == 0


@pytest.mark.parametrize(
    ("arguments", "report"),
    [
        (["--device", "h300"], "--device h300: is not known; choose one of a100, h100, h200, b200"),
        (["--device", "h200", "--gpus-per-node", "999999999"], "more than 1,048,576; give fewer"),
        (["--device", "h200", "--assume", "speed=2"], "'speed' is not known"),
        (["--device", "h200", "--assume", "link=2"], "at most 1"),
        (["--device", "h200", "--assume", "link=fast"], "'fast' is no number"),
        (["--device", "h200", "model.num_layers=7", "model.num_attention_heads=3"], "is not divisible by"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], report: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", QWEN3B, "--nodes", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert report in error
    assert error.count("\n") == 1


def test_an_impossible_own_layout_is_reported_and_another_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", QWEN3B, "--nodes", "3", "--device", "h200"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("The recipe's own layout is not possible: training.global_batch_size = 512")
    assert "Layout TP1 PP3 DP8" in printed


def test_many_experts_are_counted_not_listed() -> None:
    """As many as one likes, in no more time: their weights and biases are those of one, so many times."""
    some, many = (
        Layout(recipe_of(f"model.num_moe_experts={count}", "model.add_bias_linear=true"), 1) for count in (2, 2**40)
    )
    assert many.experts(0) == tuple(value * 2**39 for value in some.experts(0))
    assert len(many.linears()) == 4


def test_sharing_more_takes_less() -> None:
    def total(*overrides: str) -> float:
        return rank_memory(Layout(recipe_of(*overrides), 32), 0, ON_CUDA).total

    base = total()
    assert total("parallel.zero_stage=3") < base
    assert total("model.recompute_granularity=full") < base
    assert total("optimizer.cpu_offload=true") < base
    assert total("parallel.tensor=1") > base
    assert total("training.micro_batch_size=4") > base
    # Int8 tokens, and norms and SwiGLU that are not stored.
    assert total("linear.weight_format=dense", "linear.sparsity=8:8") > base


def test_memory_is_that_of_the_phase_that_takes_most(capsys: pytest.CaptureFixture[str]) -> None:
    def taken(*overrides: str) -> float:
        return candidate(recipe_of(*overrides), h200()).memory.total

    dense, ternary = taken("linear.weight_format=dense"), taken()
    assert dense > ternary
    into = "linear.phases=[{step: 100, weight_format: dense}, {step: 200, weight_format: ternary}]"
    assert taken(into) == taken("linear.weight_format=dense", into.replace("dense", "ternary")) == dense
    floating = taken("linear.activation_bits=none")
    assert taken("linear.phases=[{step: 9, activation_bits: none}]") == floating > ternary
    assert taken("linear.phases=[{step: 9, sparsity: '7:8'}]") == ternary
    assert main(["plan", QWEN3B, into, "--nodes", "4", "--device", "h200"]) == 0
    assert "in the phase that takes most; communication volume and time are of" in capsys.readouterr().out


def test_what_cuda_keeps_is_described_and_differs() -> None:
    layout = Layout(recipe_of(), 32)
    cuda, cpu = (sum(rank_memory(layout, 0, keeps).passes.values()) for keeps in (ON_CUDA, CPU.keeps))
    assert cuda < 0.75 * cpu


def test_time_follows_its_assumptions() -> None:
    layout = Layout(recipe_of("parallel.pipeline=2"), 32)
    machines = h200()
    report = duration(layout, machines.device, 8, machines.assumed)
    faster = machines_of("h200", 4, 8, ["int8_gemm=0.9", "link=1.0"])
    assert duration(layout, faster.device, 8, faster.assumed).step < report.step
    passes = sum(
        v for k, v in report.seconds.items() if k.startswith(("linear", "attention", "head", "memory", "tensor"))
    )
    assert report.seconds["pipeline bubble"] == pytest.approx(passes / layout.micro_batches)
    dense = operations(layout)["dense_step"] / report.step / 32
    assert 0.1 < dense / machines.device.bf16 < 1
    two_four = Layout(recipe_of("linear.sparsity=2:4", "parallel.pipeline=2"), 32)
    assert duration(two_four, machines.device, 8, machines.assumed).step < report.step


def test_groups_within_a_node_use_its_links() -> None:
    layout, device = Layout(recipe_of("parallel.pipeline=2"), 32), h200().device
    speeds = {group: link(layout, group, device, 8) for group in ("tensor", "data", "pipeline")}
    assert speeds == {"tensor": device.node_link, "data": device.network, "pipeline": device.network}
    assert link(Layout(recipe_of(), 8), "data", device, 8) == device.node_link


def test_one_rank_sends_nothing() -> None:
    assert bytes_of_all_ranks(Layout(recipe_of("parallel.tensor=1"), 1)) == {}


def test_options_without_a_recipe_are_refused() -> None:
    with pytest.raises(RecipeError, match="choose one of"):
        machines_of("tpu", 1, 8)


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA H100 NVL", None),
        ("Tesla V100", None),
    ],
)
def test_a_driver_s_name_of_a_device_is_that_of_a_data_sheet_or_none(product: str, name: str | None) -> None:
    device = known_device(product)
    assert (device.name if device else None) == name
