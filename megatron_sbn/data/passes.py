"""How often a run reads its data, from the heads of the indices alone.

    samples of a shard = (tokens - 1) // seq_length
    passes over it     = steps * global_batch_size * share / samples        share = weight / sum of weights

Up to about four passes repeated text is worth nearly as much as new text, beyond that less and less (Muennighoff et
al. 2023, "Scaling Data-Constrained Language Models"). Imports neither torch nor Megatron.
"""

from typing import NamedTuple

from megatron_sbn.config import Recipe
from megatron_sbn.data.index_header import shard_tokens
from megatron_sbn.errors import InputError
from megatron_sbn.text_table import count_text

MOST_PASSES = 4
_SHOWN = 4


class Passes(NamedTuple):
    """Of one entry of `data.train`: its prefix, its tokens, its share of the samples, passes of the whole run."""

    path: str
    tokens: int
    share: float
    passes: float


def training_passes(recipe: Recipe) -> list[Passes]:
    """One for each entry of `data.train`, in order. Raises InputError for a shard that is not there or is none."""
    training, shards = recipe.training, recipe.data.train
    samples = training.steps * training.global_batch_size
    weights = sum(shard.weight for shard in shards)
    result = []
    for shard in shards:
        tokens = shard_tokens(shard.path)
        share = shard.weight / weights
        in_one = max(1, (tokens - 1) // recipe.model.seq_length)
        result.append(Passes(shard.path, tokens, share, samples * share / in_one))
    return result


def data_lines(recipe: Recipe) -> list[str]:
    """For people: how much data there is, how often it is read, and a warning where that is often."""
    try:
        shards = training_passes(recipe)
    except InputError as error:
        return [f"not known: {error}"]
    tokens = count_text(sum(shard.tokens for shard in shards))
    most = sorted(shards, key=lambda shard: -shard.passes)
    if len(shards) == 1:
        lines = [f"{shards[0].path}: {tokens} tokens, {_times(shards[0].passes)}"]
    else:
        lines = [f"{tokens} tokens in {len(shards):,} shards, {_count(most[-1].passes)} to {_times(most[0].passes)}"]
        lines += [
            f"{one.path}: {count_text(one.tokens)} tokens, {one.share:.1%} of the samples, {_times(one.passes)}"
            for one in (shards if len(shards) <= _SHOWN else most[: _SHOWN - 1])
        ]
        lines += [f"and {len(shards) - _SHOWN + 1:,} shards that are read less often"] if len(shards) > _SHOWN else []
    often = [shard for shard in most if shard.passes > MOST_PASSES]
    if often:
        others = f" and {len(often) - 1:,} more" if len(often) > 1 else ""
        lines.append(
            f"warning: {often[0].path}{others}: more than {MOST_PASSES} passes, from where on repeated text adds less "
            "and less; give more text, another weight or fewer steps"
        )
    return lines


def _times(passes: float) -> str:
    return f"{_count(passes)} passes"


def _count(passes: float) -> str:
    return f"{passes:,.2f}" if passes < 10 else f"{passes:,.0f}"
