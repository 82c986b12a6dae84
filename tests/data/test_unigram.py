"""The unigram baseline equals its formula, computed token by token."""

import math

import numpy as np
import pytest

from megatron_sbn.data import unigram
from megatron_sbn.data.unigram import unigram_perplexity
from megatron_sbn.errors import InputError


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_formula(write_shard, dtype, monkeypatch):
    monkeypatch.setattr(unigram, "_TOKENS_AT_ONCE", 7)
    generator = np.random.default_rng(0)
    one, two, held_out = ([generator.integers(0, 20, size=31).tolist()] * 2 for _ in range(3))
    prefixes = [write_shard(name, data, dtype) for name, data in (("one", one), ("two", two), ("held", held_out))]
    seen = [token for document in one + two for token in document]
    asked = [token for document in held_out for token in document]
    loss = -sum(math.log((seen.count(token) + 1) / (len(seen) + 25)) for token in asked) / len(asked)
    assert unigram_perplexity(prefixes[:2], prefixes[2:], 25) == pytest.approx(math.exp(loss), rel=1e-12)


def test_uniform_tokens_have_the_perplexity_of_the_vocabulary(write_shard):
    prefix = write_shard("u", [list(range(64))])
    assert unigram_perplexity([prefix], [prefix], 64) == pytest.approx(64, rel=1e-12)


@pytest.mark.parametrize("token", [20, -1])
def test_foreign_token(write_shard, token):
    good, bad = write_shard("good", [[1, 2]]), write_shard("bad", [[1, token]])
    with pytest.raises(InputError, match=r"/bad.bin: it has token ids outside a vocabulary of 20"):
        unigram_perplexity([good], [bad], 20)
