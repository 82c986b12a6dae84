"""Mixtures of experts that cannot be trained are refused in one line with field, value and way out; others are not."""

from pathlib import Path

import pytest

from megatron_sbn.config import load_recipe
from megatron_sbn.config.validation import min_world_size, validate_world_size
from megatron_sbn.errors import RecipeError

RECIPE = """
name: base
model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 100, num_attention_heads: 8, num_query_groups: 4,
        seq_length: 32, vocab_size: 100, num_moe_experts: 4, moe_ffn_hidden_size: 48}
data: {train: some/shard}
training: {steps: 10, global_batch_size: 16, micro_batch_size: 4}
"""
NONE = "model.num_moe_experts=null"


@pytest.mark.parametrize(
    ("overrides", "expected", "way_out"),
    [
        (f"{NONE} model.moe_ffn_hidden_size=null parallel.expert=2", "parallel.expert = 2: the model has no", "use 1"),
        (NONE, "model.moe_ffn_hidden_size = 48 needs model.num_moe_experts", "leave this out"),
        (f"{NONE} model.moe_ffn_hidden_size=null model.moe_router_topk=1", "model.moe_router_topk = 1 needs", "set it"),
        (f"{NONE} model.moe_ffn_hidden_size=null model.moe_aux_loss_coeff=0.1", "moe_aux_loss_coeff = 0.1", "set it"),
        ("model.moe_router_topk=5", "model.moe_router_topk = 5 is more than model.num_moe_experts = 4", "at most 4"),
        ("parallel.expert=3", "num_moe_experts = 4 is not divisible by parallel.expert = 3", "a multiple of 3"),
        ("parallel.expert=8", "num_moe_experts = 4 is not divisible by parallel.expert = 8", "divides 4"),
        ("parallel.tensor=2 parallel.sequence=false", "parallel.sequence = false with parallel.tensor = 2", "=true"),
        ("parallel.zero_stage=3", "parallel.zero_stage = 3 with model.num_moe_experts", "zero_stage = 1 or 2"),
        ("linear.sr_ste_decay=1e-4", "linear.sr_ste_decay = 0.0001", "use 0"),
        ("model.moe_ffn_hidden_size=44", "linear.sparsity = 6:8: model.moe_ffn_hidden_size = 44", "a multiple of 8"),
        ("model.moe_ffn_hidden_size=null", "linear.sparsity = 6:8: model.ffn_hidden_size = 100", "a multiple of 8"),
        ("model.moe_ffn_hidden_size=131080", "131080 exceeds 131072", ""),
    ],
)
def test_what_cannot_be_trained_is_refused(overrides: str, expected: str, way_out: str, base: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(base, overrides.split())
    message = str(error.value)
    assert expected in message
    assert way_out in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "width", "ranks"),
    [
        ("", 48, 1),
        ("parallel.expert=4", 48, 4),
        ("model.moe_router_topk=1 model.moe_aux_loss_coeff=0.01 model.add_bias_linear=true", 48, 1),
        # An expert is whole on its rank: tensor parallelism does not cut its 48 features into 12.
        ("parallel.tensor=4 parallel.expert=2", 48, 4),
        ("parallel.tensor=2 parallel.expert=4 parallel.pipeline=2", 48, 8),
        ("linear.sparsity=8:8 model.moe_ffn_hidden_size=null", 100, 1),
    ],
)
def test_what_can_be_trained_is_not_refused(overrides: str, width: int, ranks: int, base: Path) -> None:
    recipe = load_recipe(base, overrides.split())
    assert (recipe.model.mlp_width, min_world_size(recipe)) == (width, ranks)
    validate_world_size(recipe, ranks)
    for fewer in range(1, ranks):
        with pytest.raises(RecipeError):
            validate_world_size(recipe, fewer)


@pytest.mark.parametrize(
    ("overrides", "ranks", "enough"),
    [
        ("parallel.expert=2", 1, False),
        ("parallel.expert=2", 2, True),
        ("parallel.expert=4", 2, False),
        ("parallel.expert=4 parallel.tensor=2", 2, False),
        ("parallel.expert=4 parallel.tensor=2", 4, True),
        ("parallel.expert=2 parallel.tensor=2", 2, True),
        ("parallel.expert=2 parallel.pipeline=2", 2, False),
        ("parallel.expert=2 parallel.pipeline=2", 4, True),
    ],
)
def test_ranks_of_a_stage_hold_all_experts(overrides: str, ranks: int, enough: bool, base: Path) -> None:
    recipe = load_recipe(base, overrides.split())
    if enough:
        validate_world_size(recipe, ranks)
        return
    expected = rf"parallel.expert = {recipe.parallel.expert} does not divide the .* ranks of a pipeline stage .*; start"
    with pytest.raises(RecipeError, match=expected):
        validate_world_size(recipe, ranks)
