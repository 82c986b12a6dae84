"""The baseline that every language model must beat: the perplexity of token frequencies.

p(v) = (count_train(v) + 1) / (tokens_train + vocab_size)        perplexity = exp(-mean over validation of ln p)
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_sbn.errors import InputError

_TOKENS_AT_ONCE = 1 << 24


def unigram_perplexity(training: Sequence[str | Path], validation: Sequence[str | Path], vocab_size: int) -> float:
    """Perplexity of all tokens of the validation shards under add-one-smoothed counts of the training shards.

    Reads every token of every shard once. Raises InputError for a shard that is damaged, or has a token outside
    0 <= id < vocab_size.
    """
    counts = sum(_counts(prefix, vocab_size) for prefix in training) + np.zeros(vocab_size)  # [vocab_size]
    held_out = sum(_counts(prefix, vocab_size) for prefix in validation) + np.zeros(vocab_size)  # [vocab_size]
    return float(np.exp(unigram_loss(counts, held_out)))


def unigram_loss(counts: np.ndarray, held_out: np.ndarray) -> float:
    """Nats per held-out token: both are counts of each token, [vocab_size], in training and held-out text."""
    log_p = np.log(counts + 1) - np.log(counts.sum() + len(counts))
    return float(-(held_out @ log_p) / held_out.sum())


def _counts(prefix: str | Path, vocab_size: int) -> np.ndarray:
    """How often each token occurs in a shard: int64 [vocab_size]."""
    from megatron_sbn.data.shards import Shard  # imports torch, and `unigram_loss` needs none

    shard = Shard(prefix)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, shard.tokens, _TOKENS_AT_ONCE):
        tokens = shard.read(start, min(_TOKENS_AT_ONCE, shard.tokens - start))
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
            raise InputError(
                f"{prefix}.bin: it has token ids outside a vocabulary of {vocab_size}; check the tokenizer"
            )
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts
