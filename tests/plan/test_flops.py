"""FLOPs per token against numbers worked out by hand, and against Qwen2.5-0.5B's known size."""

import pytest

from megatron_sbn.config import Recipe
from megatron_sbn.plan.flops import linear_weights, model_flops_per_token


def recipe(linear=None, **model):
    sizes = {
        "num_layers": 2,
        "hidden_size": 8,
        "ffn_hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 10,
        "vocab_size": 100,
        "make_vocab_size_divisible_by": 64,
    }
    return Recipe.model_validate(
        {
            "name": "r",
            "model": sizes | model,
            "linear": linear or {},
            "data": {"train": "x"},
            "training": {"steps": 10, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )


def test_by_hand():
    # One layer: qkv 8 x (8 + 4 + 4) = 128, projection 8 x 8 = 64, gate + up 8 x 32 = 256, down 16 x 8 = 128: 576.
    # Head 8 x 128 = 1024 (100 padded to 128). Attention 6 x 2 layers x 10 tokens x 8 = 960.
    assert linear_weights(recipe().model) == 1152
    assert model_flops_per_token(recipe()) == (6 * (1152 + 1024) + 960, 5.5 * 1152 + 6 * 1024 + 960)
    assert model_flops_per_token(recipe({"sparsity": "2:4"}))[1] == 5 * 1152 + 6 * 1024 + 960


def test_a_token_passes_the_experts_that_it_is_sent_to():
    # One layer: attention 192 as above, two of four experts of 3 x 8 x 12 = 288 each, router 4 x 8 = 32.
    mixture = recipe(num_moe_experts=4, moe_ffn_hidden_size=12)
    assert linear_weights(mixture.model) == 2 * (192 + 2 * 288)
    floating = 1024 + 2 * 32
    assert model_flops_per_token(mixture) == (6 * (1536 + floating) + 960, 5.5 * 1536 + 6 * floating + 960)
    # An expert is as wide as the dense MLP where nothing else is said.
    assert linear_weights(recipe(num_moe_experts=4, moe_router_topk=1).model) == linear_weights(recipe().model)


def test_no_sparsity_no_difference():
    dense, sparse = model_flops_per_token(recipe({"weight_format": "dense", "sparsity": "8:8"}))
    assert dense == sparse == 14016


def test_heads_wider_than_the_hidden_size():
    # qkv 8 x (4 + 2 + 2) x 6 = 384, projection 24 x 8 = 192, MLP 384.
    model = recipe(kv_channels=6).model
    assert linear_weights(model) == 2 * (384 + 192 + 384)
    assert model_flops_per_token(recipe(kv_channels=6))[0] == 6 * (1920 + 1024) + 6 * 2 * 10 * 24


def test_phases():
    linear = {"sparsity": "8:8", "phases": [{"step": 5, "sparsity": "4:8"}, {"step": 8, "activation_bits": "none"}]}
    by_step = [model_flops_per_token(recipe(linear), step)[1] for step in (0, 4, 5, 9)]
    assert by_step == [14016, 14016, 14016 - 1152, 14016 - 1152]


def test_qwen_half_a_billion():
    """Qwen2.5-0.5B: 0.36B parameters outside the embedding."""
    model = recipe(
        num_layers=24, hidden_size=896, ffn_hidden_size=4864, num_attention_heads=14, num_query_groups=2
    ).model
    assert linear_weights(model) == pytest.approx(0.358e9, rel=2e-3)
