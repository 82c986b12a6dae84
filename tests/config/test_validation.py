"""Every combination that cannot be trained is refused in one line with field, value and way out; the others are not."""

# ruff: noqa: E501
# One case a line.
import contextlib
from itertools import product
from pathlib import Path

import pytest

from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.config.validation import validate_world_size
from megatron_sbn.errors import RecipeError
from megatron_sbn.layers.weight_quantizer import settings_at

RECIPE = """
name: base
model: {num_layers: 8, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 8, num_query_groups: 4,
        seq_length: 32, vocab_size: 100}
data: {train: some/shard}
training: {steps: 10, global_batch_size: 16, micro_batch_size: 4}
"""


@pytest.mark.parametrize(
    ("overrides", "expected", "way_out"),
    [
        # the model
        ("model.hidden_size=68", "model.hidden_size = 68 is not divisible by model.num_attention_heads = 8", "64 or 72"),
        ("model.num_query_groups=3", "model.num_attention_heads = 8 is not divisible by model.num_query_groups = 3", "6 or 9"),
        ("model.kv_channels=7 linear.sparsity=8:8", "model.kv_channels = 7: rotary", "even width"),
        ("model.rotary_percent=1.5", "model.rotary_percent = 1.5", "at most 1.0"),
        # the layout
        ("parallel.tensor=16", "model.num_attention_heads = 8 is not divisible by parallel.tensor = 16", "use 16"),
        ("parallel.tensor=8", "model.num_query_groups = 4 is not divisible by parallel.tensor = 8", "use 8"),
        ("parallel.tensor=4 model.ffn_hidden_size=130 linear.sparsity=8:8", "model.ffn_hidden_size = 130", "128 or 132"),
        ("parallel.tensor=2 model.vocab_size=3 model.make_vocab_size_divisible_by=1", "model.vocab_size (padded) = 3", "2 or 4"),
        ("parallel.tensor=4 model.seq_length=30", "model.seq_length = 30 is not divisible by parallel.tensor = 4", "parallel.sequence=false"),
        ("parallel.pipeline=3", "model.num_layers = 8 is not divisible by parallel.pipeline = 3", "6 or 9"),
        ("parallel.pipeline=2 parallel.virtual_pipeline=3", "model.num_layers = 8 is not divisible by parallel.pipeline x", "6 or 12"),
        ("parallel.virtual_pipeline=2", "parallel.virtual_pipeline = 2 needs parallel.pipeline > 1", "leave it out"),
        ("parallel.pipeline=3", "model.num_layers = 8 is not divisible", "an uneven split with parallel.num_layers_in_first_pipeline_stage"),
        ("parallel.num_layers_in_first_pipeline_stage=2", "parallel.num_layers_in_first_pipeline_stage = 2", "needs parallel.pipeline > 1"),
        ("parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.num_layers_in_last_pipeline_stage=2", "parallel.num_layers_in_last_pipeline_stage = 2", "without parallel.virtual_pipeline"),
        ("parallel.pipeline=4 parallel.num_layers_in_first_pipeline_stage=3", "leaves 5 of model.num_layers = 8 for 3 other", "the same number"),
        ("parallel.pipeline=2 parallel.num_layers_in_first_pipeline_stage=8", "leaves 0 of model.num_layers = 8 for 1 other", "at least 1"),
        ("parallel.pipeline=2 parallel.num_layers_in_first_pipeline_stage=3 parallel.num_layers_in_last_pipeline_stage=4", "leaves 1 of model.num_layers = 8 for 0 other", "at least 1"),
        ("parallel.pipeline=2 parallel.zero_stage=3", "parallel.zero_stage = 3 with parallel.pipeline = 2", "parallel.zero_stage = 1 or 2"),
        ("parallel.zero_stage=0", "parallel.zero_stage = 0", ""),
        ("parallel.expert=2", "parallel.expert = 2", "use 1, or set model.num_moe_experts"),
        # linear layers
        ("linear.mask_source=quantized linear.order=mask_then_quant", "linear.mask_source = 'quantized'", "needs linear.order"),
        ("linear.sparsity=0:8", "linear.sparsity = 0:8", "1 <= N <= M <= 32"),
        ("linear.sparsity=9:8", "linear.sparsity = 9:8", "1 <= N <= M <= 32"),
        ("linear.sparsity=6:64", "linear.sparsity = 6:64", "1 <= N <= M <= 32"),
        ("linear.sparsity=2:5", "linear.sparsity = 2:5: model.hidden_size = 64", "multiple of 5"),
        ("linear.sparsity=2:32 parallel.tensor=4", "the attention width (heads x kv_channels) = 64 over 4", "multiple of 128"),
        ("model.ffn_hidden_size=136 parallel.tensor=2", "model.ffn_hidden_size = 136 over 2", "multiple of 16"),
        ("linear.phases=[{step:,sparsity: 6:9}]", "linear.phases.0.step", ""),
        ("linear.phases=[{step: 3,sparsity: 6:9}]", "linear.phases.0.sparsity = 6:9", "multiple of 9"),
        ("linear.phases=[{step: 3},{step: 3}]", "linear.phases.1.step = 3", "in order"),
        ("linear.mask_source=quantized linear.weight_format=dense", "linear.mask_source = 'quantized'", "leave it at 'latent'"),
        ("linear.backward=int8 linear.weight_format=dense", "linear.backward = 'int8'", "leave it at 'exact'"),
        ("linear.order=mask_then_quant linear.weight_format=dense", "linear.order = 'mask_then_quant'", "leave it"),
        ("model.ffn_hidden_size=131080", "131080 exceeds 131072", ""),
        ("linear.backward=int8 linear.activation_bits=none", "linear.backward = 'int8' needs quantized activations", "activation_bits to 8"),
        # bad steps
        ("training.on_bad_step=rollback", "training.on_bad_step = 'rollback' needs checkpoints", "set it, or use 'skip'"),
        ("training.on_bad_step=rollback checkpoint.interval=5 checkpoint.keep=1", "training.rollback_steps = 1 is more", "checkpoint.keep to 2"),
        ("training.on_bad_step=rollback checkpoint.interval=5 training.rollback_steps=6", "what is kept reaches back: 2, one each 5", "checkpoint.keep to 3"),
        # the schedule
        ("optimizer.min_lr=1e-3", "optimizer.min_lr = 0.001 is above optimizer.lr = 0.0003", "lower it"),
        ("start_with=weights", "start_with = weights: there is no start_from", "name a run"),
        ("training.profile={start: 10}", "training.profile.start = 10: the run has 10 steps", "start earlier"),
        ("training.profile={start: 1, ranks: []}", "profiles nothing", "name ranks"),
        ("linear.phases=[{step: 10, sparsity: '4:8'}]", "linear.phases.0.step = 10: never begins", "begin earlier"),
        ("optimizer.lr_warmup_steps=11", "optimizer.lr_warmup_steps = 11 is longer than the 10 steps", "shorten it"),
        ("optimizer.stages=[{step: 1,lr: 1,end_lr: 1,weight_decay: 0}]", "optimizer.stages start at steps [1]", "the first at 0"),
        (
            "optimizer.stages=[{step: 0,lr: 1,end_lr: 1,weight_decay: 0},{step: 0,lr: 1,end_lr: 1,weight_decay: 0}]",
            "optimizer.stages start at steps [0, 0]",
            "each after the last",
        ),
        # the batch
        ("training.micro_batch_size=3", "training.global_batch_size = 16 is not a multiple of training.micro_batch_size = 3", ""),
        ("training.validation_interval=5", "training.validation_interval = 5 needs data.validation", "interval to 0"),
    ],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(overrides: str, expected: str, way_out: str, base: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(base, split(overrides))
    message = str(error.value)
    assert expected in message
    assert way_out in message
    assert "\n" not in message


def split(overrides: str) -> list[str]:
    """Overrides in one string: a new one begins at ` section.key=`."""
    parts: list[str] = []
    for word in overrides.split(" "):
        if ("=" in word and "." in word.partition("=")[0]) or word.startswith("start_"):
            parts.append(word)
        else:
            parts[-1] += " " + word
    return parts


@pytest.mark.parametrize(
    "overrides",
    [
        "model.hidden_size=72 model.kv_channels=16 linear.sparsity=6:8",
        "model.hidden_size=68 model.kv_channels=8 linear.sparsity=8:8",
        "parallel.tensor=4",
        "parallel.tensor=1 model.seq_length=31",
        "parallel.tensor=2 model.seq_length=31 parallel.sequence=false",
        "parallel.pipeline=2 parallel.virtual_pipeline=4",
        "parallel.virtual_pipeline=1",
        "parallel.pipeline=4 parallel.num_layers_in_first_pipeline_stage=5",
        "parallel.pipeline=2 parallel.num_layers_in_first_pipeline_stage=7 parallel.num_layers_in_last_pipeline_stage=1",
        "parallel.zero_stage=3 parallel.tensor=2",
        "linear.sparsity=16:32 parallel.tensor=2",
        "linear.sparsity=7:7",
        "linear.sparsity=1:1",
        "linear.weight_format=dense model.ffn_hidden_size=131080",
        "linear.activation_bits=none model.ffn_hidden_size=131080",
        "model.ffn_hidden_size=131072",
        "linear.mask_source=quantized linear.phases=[{step: 3,weight_format: dense}]",
        "optimizer.lr_warmup_steps=10",
        "optimizer.lr_warmup_steps=50 optimizer.lr_decay_steps=100",
        "optimizer.min_lr=3e-4",
        "training.validation_interval=5 data.validation=held/out",
        "linear.backward=int8 linear.weight_format=dense linear.phases=[{step: 3,weight_format: ternary}]",
        "linear.backward=int8 linear.activation_bits=none linear.phases=[{step: 3,activation_bits: 8}]",
        "training.on_bad_step=rollback checkpoint.interval=5 training.rollback_steps=5",
        "training.on_bad_step=rollback checkpoint.interval=5 training.rollback_steps=6 checkpoint.keep_every=5",
    ],
)
def test_what_can_be_trained_is_not_refused(overrides: str, base: Path) -> None:
    assert isinstance(load_recipe(base, split(overrides)), Recipe)


def recipe(base: Path, overrides: str = "") -> Recipe:
    return load_recipe(base, split(overrides) if overrides else [])


@pytest.mark.parametrize(
    ("overrides", "world", "expected", "way_out"),
    [
        ("parallel.tensor=2", 3, "parallel.tensor = 2 x parallel.pipeline = 1 needs a multiple of 2 ranks, and 3", "start 2"),
        ("parallel.tensor=2 parallel.pipeline=2", 2, "needs a multiple of 4 ranks, and 2 were started", "start 4"),
        ("training.micro_batch_size=4", 3, "training.global_batch_size = 16 is not divisible by", "a multiple of 12"),
        ("training.micro_batch_size=16", 2, "training.micro_batch_size = 16 x 2 data-parallel ranks", "a multiple of 32"),
        (
            "parallel.pipeline=2 parallel.virtual_pipeline=2 training.micro_batch_size=16",
            2,
            "parallel.virtual_pipeline = 2 needs a multiple of 2 micro-batches per step, and there are 1",
            "change training.global_batch_size",
        ),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_a_world_that_does_not_fit_is_refused(
    overrides: str, world: int, expected: str, way_out: str, base: Path
) -> None:
    with pytest.raises(RecipeError) as error:
        validate_world_size(recipe(base, overrides), world)
    assert expected in str(error.value)
    assert way_out in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "fitting"),
    [
        ("", [1, 2, 4]),
        ("parallel.tensor=4", [4, 8, 16]),
        ("parallel.pipeline=2 parallel.virtual_pipeline=2", [2, 4]),
    ],
)
def test_worlds_that_fit_are_taken_and_all_others_refused(overrides: str, fitting: list[int], base: Path) -> None:
    taken = []
    for world in range(1, 33):
        with contextlib.suppress(RecipeError):
            validate_world_size(recipe(base, overrides), world)
            taken.append(world)
    assert taken == fitting


def test_the_way_out_works(base: Path) -> None:
    """The numbers that messages propose are accepted."""
    for refused, proposed in (
        ("model.num_query_groups=3", "model.num_query_groups=4"),
        ("parallel.pipeline=3 model.num_layers=8", "parallel.pipeline=3 model.num_layers=9"),
        ("model.ffn_hidden_size=136 parallel.tensor=2", "model.ffn_hidden_size=144 parallel.tensor=2"),
        ("linear.sparsity=2:5", "linear.sparsity=2:5 model.hidden_size=80 model.ffn_hidden_size=160"),
    ):
        with pytest.raises(RecipeError):
            recipe(base, refused)
        recipe(base, proposed)


def test_settings_refused_late_are_refused_early_too(base: Path) -> None:
    """Every combination of `linear` that passes the recipe can be made into the layers' settings at every step."""
    made = 0
    choices = {
        "weight_format": ("ternary", "dense"),
        "sparsity": ("6:8", "8:8"),
        "activation_bits": ("8", "4", "none"),
        "order": ("quant_then_mask", "mask_then_quant"),
        "mask_source": ("latent", "quantized"),
        "masked_gradient": ("dense", "masked"),
        "backward": ("exact", "int8_dgrad", "int8"),
        "phases": ("[]", "[{step: 2,weight_format: dense}]", "[{step: 2,activation_bits: none,sparsity: 4:8}]"),
    }
    for values in product(*choices.values()):
        overrides = [f"linear.{key}={value}" for key, value in zip(choices, values, strict=True)]
        try:
            accepted = load_recipe(base, overrides)
        except RecipeError:
            continue
        for step in (0, 2):
            settings_at(accepted.linear, step, 3)
        made += 1
    assert made > 200
