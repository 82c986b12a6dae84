"""A recipe's layout with a model that starts in seconds: same arithmetic, same shards, smallest widths that they allow.

Kept: everything of `linear` and `parallel`, heads per query group, ties, biases, rotary settings, number formats,
recomputation, experts' choice, pipeline splits. Made small: widths, layers, vocabulary, sequence, batch, steps.
"""

import math
from typing import Any

import numpy as np

from megatron_sbn.config import Recipe
from megatron_sbn.config.validation import validate_recipe

MICRO_BATCH, WIDTH = 2, 48
_STEPS = 1 << 10
_UNEVEN = 2
_ENDS = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")


def tiny_recipe(recipe: Recipe, data_size: int = 1) -> Recipe:
    """The recipe with a tiny model, for `data_size` data-parallel replicas."""
    values = recipe.plain()
    values["model"] |= _model(recipe)
    values["parallel"] |= dict.fromkeys(_ends(recipe), _UNEVEN)
    micro_batches = 2 * recipe.parallel.pipeline
    values["training"] |= {
        "steps": _STEPS,
        "global_batch_size": MICRO_BATCH * micro_batches * data_size,
        "micro_batch_size": MICRO_BATCH,
        "validation_interval": 0,
        "telemetry_interval": 0,
    }
    values["optimizer"] |= {
        "lr_warmup_steps": 0,
        "lr_warmup_fraction": None,
        "lr_decay_steps": None,
        "min_lr": 0.0,
        "stages": (),
    }
    values["data"] = {"train": "unused"}
    values["run_dir"] = None
    if recipe.device == "cuda":  # a layout for GPUs can be compared before there are any
        values["device"] = "auto"
    tiny = Recipe.model_validate(values)
    validate_recipe(tiny)
    return tiny


def one_rank(recipe: Recipe) -> Recipe:
    """The same model, batch and arithmetic on a single rank."""
    values = recipe.plain()
    values["parallel"] = {"tensor": 1, "pipeline": 1, "expert": 1, "zero_stage": 1}
    values["optimizer"] |= {"cpu_offload": False}
    return Recipe.model_validate(values)


def batch_of(recipe: Recipe, step: int) -> np.ndarray:
    """The global batch of a step, int64 [global_batch, tokens + 1]: a fixed random walk that can be learnt."""
    rng = np.random.default_rng(1000 + step)
    shape = (recipe.training.global_batch_size, recipe.model.seq_length + 1)
    return (rng.integers(0, 7, shape).cumsum(axis=1) % recipe.model.vocab_size).astype(np.int64)


def _model(recipe: Recipe) -> dict[str, Any]:
    """Widths: the smallest that groups of M, heads and shards fill."""
    model, tensor = recipe.model, recipe.parallel.tensor
    sparsities = [recipe.linear.sparsity, *(phase.sparsity for phase in recipe.linear.phases if phase.sparsity)]
    group = math.lcm(4, *(m for n, m in sparsities if n < m))  # 4: widths of whole words
    groups = tensor * (2 if model.query_groups > tensor else 1)
    heads = groups * (model.num_attention_heads // model.query_groups)
    head_dim = next(d for d in range(4, 4 * group + 1, 2) if heads * d // tensor % group == 0)
    width = -(-WIDTH // group) * group
    return {
        "num_layers": _layers(recipe),
        "hidden_size": width,
        "ffn_hidden_size": 2 * group * tensor * -(-WIDTH // (2 * group * tensor)),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": head_dim,
        "seq_length": 9 * tensor,
        "vocab_size": 120,
        "make_vocab_size_divisible_by": 16 * tensor,
    }


def _ends(recipe: Recipe) -> list[str]:
    """Settings of an uneven pipeline split that are in force."""
    parallel = recipe.parallel.model_dump()
    return [field for field in _ENDS if parallel[field] is not None]


def _layers(recipe: Recipe) -> int:
    """One layer in every chunk and `_UNEVEN` in stages of their own number, at least two."""
    chunks = recipe.parallel.pipeline * (recipe.parallel.virtual_pipeline or 1)
    return max(2, chunks + (_UNEVEN - 1) * len(_ends(recipe)))
