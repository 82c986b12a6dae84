"""Recipe files, extends and overrides: what is read, and the one line that refuses what cannot be."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from time_limit import LIMIT_SECONDS

from megatron_sbn.config import Linear, Recipe, load_recipe
from megatron_sbn.errors import RecipeError

ROOT = Path(__file__).parents[2]
MINIMAL = """
name: minimal
model: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, seq_length: 32, vocab_size: 100}
data: {train: some/shard}
training: {steps: 10, global_batch_size: 8, micro_batch_size: 4}
"""


@pytest.fixture(scope="module")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message of the RecipeError, which must be one line."""
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    assert "\n" not in str(error.value)
    assert error.value.status == 2
    return str(error.value)


def test_defaults_are_the_methods(minimal: Path) -> None:
    recipe = load_recipe(minimal)
    assert recipe.model.layernorm_epsilon == 1e-5
    assert recipe.linear.model_dump() == {
        "weight_format": "ternary",
        "sparsity": (6, 8),
        "activation_bits": 8,
        "order": "quant_then_mask",
        "mask_source": "latent",
        "masked_gradient": "dense",
        "sr_ste_decay": 0.0,
        "backward": "exact",
        "backend": "auto",
        "forward_form": "auto",
        "mask_interval": 1,
        "mask_freeze_step": None,
        "phases": (),
    }
    optimizer = recipe.optimizer
    assert (optimizer.lr, optimizer.min_lr, optimizer.weight_decay, optimizer.clip_grad) == (3e-4, 1e-5, 0.1, 1.0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-8)


def test_a_recipe_is_frozen(minimal: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(minimal).model.hidden_size = 8


# Sweep files hold no recipe but expand to many: tests/config/test_sweep.py has the same test of each of those.
RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path.parent.name != "sweeps"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_recipe_of_the_project_loads_and_survives_being_written(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert load_recipe(write(tmp_path / "resolved.yaml", recipe.to_yaml())) == recipe


def test_a_resolved_recipe_is_the_recipe(minimal: Path, tmp_path: Path) -> None:
    overrides = [
        "linear.activation_bits=none",
        "linear.sparsity=[4, 8]",
        "linear.phases=[{step: 3, sparsity: 6:8, activation_bits: 8}, {step: 7, activation_bits: none}, {step: 9}]",
        "optimizer.stages=[{step: 0, lr: 1e-3, end_lr: 5e-4, weight_decay: 0.1}]",
        "data.train=[a, {path: b, weight: 0.5}]",
        "run_dir=somewhere",
        "model.bf16=false",
    ]
    recipe = load_recipe(minimal, overrides)
    resolved = write(tmp_path / "resolved.yaml", recipe.to_yaml())
    assert load_recipe(resolved) == recipe
    assert yaml.safe_load(resolved.read_text())["linear"]["sparsity"] == "4:8"
    assert [phase.activation_bits for phase in recipe.linear.phases] == [8, None, "unchanged"]
    assert [(shard.path, shard.weight) for shard in recipe.data.train] == [("a", 1.0), ("b", 0.5)]
    flat = recipe.flat()
    assert flat["model.hidden_size"] == "64"
    assert flat["linear.sparsity"] == "4:8"
    assert flat["name"] == "minimal"


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("linear.sparsity=6:8", (6, 8)),
        ("linear.sparsity=1:16", (1, 16)),  # YAML 1.1 reads 76
        ("linear.sparsity='4:8'", (4, 8)),
        ("linear.sparsity=[2, 4]", (2, 4)),
        ("optimizer.lr=3e-4", 3e-4),  # YAML 1.1 reads text
        ("optimizer.lr=3E-4", 3e-4),
        ("optimizer.lr=.001", 1e-3),
        ("optimizer.lr=1.", 1.0),
        ("optimizer.clip_grad=1", 1.0),
        ("training.seed=010", 10),  # YAML 1.1 reads 8
        ("linear.activation_bits=none", None),
        ("linear.activation_bits=4", 4),
        ("model.bf16=false", False),
        ("model.num_query_groups=null", None),
        ("parallel.virtual_pipeline=1", None),  # the same thing
        ("model.num_query_groups=", None),
        ("data.tokenizer=a=b", "a=b"),
    ],
)
def test_values_are_read_as_people_write_them(override: str, value: object, minimal: Path) -> None:
    recipe = load_recipe(minimal, ["optimizer.min_lr=0", override] if "min_lr" not in override else [override])
    section, key = override.partition("=")[0].split(".")
    found = recipe.model_dump()[section][key]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.hiden_size=64", "model.hiden_size is not a recipe key; did you mean model.hidden_size?"),
        ("hidden_size=64", "hidden_size is not a recipe key; did you mean model.hidden_size?"),
        ("optimiser.lr=1", "optimiser is not a recipe key; did you mean optimizer?"),
        (
            "zzz=1",
            "zzz is not a recipe key; the sections are name, run_dir, start_from",
        ),
        ("model.hidden_size=wide", "model.hidden_size = 'wide'"),
        ("model.hidden_size=64.0", "model.hidden_size = 64.0"),
        ("model.hidden_size='64'", "model.hidden_size = '64'"),
        ("model.hidden_size=0", "model.hidden_size = 0"),
        ("model.hidden_size=-64", "model.hidden_size = -64"),
        ("model.hidden_size=true", "model.hidden_size = True"),
        ("model.hidden_size=", "model.hidden_size = None"),
        ("model.hidden_size=0x40", "model.hidden_size = '0x40'"),
        ("model.hidden_size=1_000", "model.hidden_size = '1_000'"),
        ("model.bf16=1", "model.bf16 = 1"),
        ("model.bf16='yes'", "model.bf16 = 'yes'"),
        ("model=7", "model = 7"),
        ("model.rotary_percent=.nan", "model.rotary_percent = nan"),
        ("optimizer.lr=.inf", "optimizer.lr = inf"),
        ("optimizer.lr=fast", "optimizer.lr = 'fast'"),
        ("optimizer.lr=true", "optimizer.lr = True"),
        ("optimizer.adam_beta1=1", "optimizer.adam_beta1 = 1"),
        ("optimizer.parameter_dtype=bf16", "optimizer.parameter_dtype = 'bf16'"),
        ("optimizer.stages=[{step: 0}]", "optimizer.stages.0.lr is missing"),
        ("linear.sparsity=6", "linear.sparsity = 6: write N:M, such as 6:8"),
        ("linear.sparsity=6:8:9", "linear.sparsity = '6:8:9': write N:M"),
        ("linear.sparsity=[6, true]", "linear.sparsity = [6, True]: write N:M"),
        ("linear.activation_bits=16", "linear.activation_bits = 16"),
        ("linear.weight_format=int4", "linear.weight_format = 'int4': Input should be 'ternary' or 'dense'"),
        ("linear.phases=[{step: 1, sparsiti: 6:8}]", "linear.phases.0.sparsiti is not a recipe key"),
        ("linear.phases=7", "linear.phases = 7"),
        ("parallel.zero_stage=4", "parallel.zero_stage = 4"),
        ("data.train=[]", "data.train = []"),
        ("data.train=[{weight: 1}]", "data.train.0.path is missing"),
        ("data.train=[{path: a, weight: 0}]", "data.train.0.weight = 0"),
        ("name=../escape", "name = '../escape'"),
        ("name=" + "x" * 201, "at most 200 characters"),
        ("run_dir=" + "x" * 256, "no folder can be called so"),
        ('run_dir="a\\0b"', "no folder can be called so"),
        ('run_dir="\\ud800"', "run_dir = "),
        ("training.steps=9007199254740993", "less than or equal to 9007199254740992"),
        ("name=", "name = None"),
        ("training.steps=99999999999999999999999x", "training.steps = '99999999999999999999999x'"),
    ],
)
def test_wrong_values_are_named(override: str, expected: str, minimal: Path) -> None:
    assert expected in refusal(minimal, override)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    assert "model is missing" in refusal(write(tmp_path / "a.yaml", "name: a"))
    path = write(tmp_path / "b.yaml", MINIMAL.replace("vocab_size: 100", ""))
    assert "model.vocab_size is missing: the recipe must set it" in refusal(path)


@pytest.mark.parametrize("override", ["training.steps", "=3", "", "training.steps 3"])
def test_an_override_is_section_key_equals_value(override: str, minimal: Path) -> None:
    assert "an override is section.key=value, such as training.steps=20" in refusal(minimal, override)


@pytest.mark.parametrize("override", ["name.deep=1", "model.hidden_size.x=1", "data.train.0=a"])
def test_an_override_into_what_is_no_section(override: str, minimal: Path) -> None:
    assert "is not a section" in refusal(minimal, override)


def test_the_last_override_wins(minimal: Path) -> None:
    assert load_recipe(minimal, ["training.steps=3", "training.steps=5"]).training.steps == 5


def test_keys_and_overrides_with_line_breaks_stay_on_one_line(minimal: Path) -> None:
    for override in ("model.hidden\nsize=1", "optimizer.lr=,\r\n", "no\nequals", "name\n.x.y=1"):
        assert len(refusal(minimal, override).splitlines()) == 1


def test_a_long_value_is_cut(minimal: Path) -> None:
    message = refusal(minimal, "model.hidden_size=" + "x" * 5000)
    assert len(message) < 300
    assert "..." in message


KEYS = [f"{s}.{k}" for s, f in Recipe.model_fields.items() if hasattr(f.annotation, "model_fields") for k in f.annotation.model_fields]  # fmt: skip  # noqa: E501
SCALARS = st.one_of(
    st.integers(-3, 200),
    st.floats(width=32),
    st.booleans(),
    st.none(),
    st.text(max_size=8),
    st.sampled_from(
        ["6:8", "8:8", "4:8", "none", "ternary", "dense", "3e-4", "0o7", "1:2:3", "2026-01-01", "!!binary x"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["step", "sparsity", "path", "weight", "lr", "end_lr", "x"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
OVERRIDES = st.tuples(st.sampled_from([*KEYS, "name", "run_dir", "extends", "model", "x"]), VALUES)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(overrides=st.lists(OVERRIDES, max_size=4), raw=st.text(max_size=20))
def test_any_override_gives_a_recipe_or_one_line(minimal: Path, overrides: list[tuple[str, object]], raw: str) -> None:
    flow = [f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10_000)}" for key, value in overrides]
    texts = [text.removesuffix("\n").removesuffix("\n...") for text in flow]
    for given_overrides in (texts, [*texts, f"optimizer.lr={raw}"], [raw]):
        assert is_recipe_or_one_line(minimal, given_overrides)


def is_recipe_or_one_line(path: Path, overrides: list[str]) -> bool:
    try:
        return isinstance(load_recipe(path, overrides), Recipe)
    except RecipeError as error:
        return len(str(error).splitlines()) == 1


# --- at the level of the process -------------------------------------------------------------------------------------


def processor_seconds() -> float:
    """Of the processes that this one has waited for: what a busy machine does not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(*arguments: str, **environment: str) -> tuple[int, str, float]:
    """Exit status, stderr and processor seconds of `python ARGUMENTS` in the project's folder."""
    began = processor_seconds()
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID")}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=inherited | environment, capture_output=True, text=True,
        timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr, processor_seconds() - began


def test_configuration_imports_no_torch() -> None:
    modules = "megatron_sbn.config, megatron_sbn.config.validation, megatron_sbn.errors"
    entries = "megatron_sbn.launch, megatron_sbn.launch.environment, megatron_sbn.train, megatron_sbn.cli"
    check = f"import {modules}, {entries}, sys; sys.exit(len({{'torch', 'deepspeed', 'megatron'}} & set(sys.modules)))"
    status, expected, _ = run("-c", check)
    assert status == 0, expected


def test_a_misspelt_key_costs_nothing() -> None:
    status, expected, seconds = run("-m", "megatron_sbn.train", "recipes/quickstart.yaml", "model.hiden_size=64")
    assert status == 2
    assert expected == "sbn: model.hiden_size is not a recipe key; did you mean model.hidden_size?\n"
    assert seconds < 2


def test_a_wrong_number_of_ranks_costs_nothing() -> None:
    for size, expected in (
        ("3", "sbn: parallel.tensor = 2 x parallel.pipeline = 1 needs a multiple of 2 ranks, and 3 were started; "),
        ("many", "sbn: environment variable WORLD_SIZE = 'many' is not a number; unset it\n"),
    ):
        status, message, seconds = run("-m", "megatron_sbn.train", "recipes/quickstart.yaml", RANK="0", WORLD_SIZE=size)
        assert status == 2
        assert message.startswith(expected)
        assert len(message.splitlines()) == 1
        assert seconds < 2


def test_only_rank_0_speaks_for_all() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "3"}
    status, expected, _ = run("-m", "megatron_sbn.train", "recipes/quickstart.yaml", **environment)
    assert (status, expected) == (2, "")


def test_the_recipe_knows_every_backend_and_form_of_the_kernels() -> None:
    """schema.py imports no torch, so it lists them itself."""
    import typing

    import sbn_kernels

    fields = Linear.model_fields
    assert set(typing.get_args(fields["backend"].annotation)) == set(sbn_kernels.BACKENDS)
    assert set(typing.get_args(fields["forward_form"].annotation)) == set(sbn_kernels.FORMS)


def test_recipes_of_the_package_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/tiny/ternary-6of8.yaml").name == "tiny-ternary-6of8"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own.yaml").write_text("name: x\n")
    with pytest.raises(RecipeError, match="model is missing"):
        load_recipe("recipes/own.yaml")
    with pytest.raises(RecipeError, match="recipes/nowhere.yaml: "):
        load_recipe("recipes/nowhere.yaml")


def test_pytorchs_names_of_types(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    assert load_recipe(recipe, ["optimizer.parameter_dtype=float32"]) == load_recipe(recipe)
    with pytest.raises(RecipeError, match="optimizer.parameter_dtype = 'bf16'"):
        load_recipe(recipe, ["optimizer.parameter_dtype=bfloat16"])
