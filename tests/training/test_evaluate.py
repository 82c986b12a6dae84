"""Validation samples: which are taken, and what is refused before training."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from megatron_sbn.config import load_recipe
from megatron_sbn.data.shards import ShardWriter
from megatron_sbn.errors import InputError
from megatron_sbn.training.evaluate import Evaluator

RECIPE = """
name: base
model: {num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, seq_length: 16, vocab_size: 100}
data: {train: unused, validation: SHARD}
training: {steps: 10, global_batch_size: 4, micro_batch_size: 1, validation_interval: 5, validation_samples: 4}
"""


def evaluator(folder: Path, last_token: int, data_rank: int) -> Evaluator:
    """That of one of two replicas; the shard has 64 tokens, and one more."""
    writer = ShardWriter(folder / "held.bin", folder / "held.idx", 1000)
    writer.add(np.array([*range(64), last_token]))
    writer.finish()
    (folder / "base.yaml").write_text(RECIPE.replace("SHARD", str(folder / "held")))
    parallel = mock.Mock(data=mock.Mock(rank=data_rank, size=2), pipeline=mock.Mock(size=1))
    return Evaluator(load_recipe(folder / "base.yaml"), parallel)


def test_replicas_share_the_samples(tmp_path: Path) -> None:
    samples = [evaluator(tmp_path, 99, rank)._samples for rank in (0, 1)]
    assert np.concatenate(samples)[:, 0].tolist() == [0, 16, 32, 48]
    assert samples[1][-1].tolist() == [*range(48, 64), 99]


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """The padded embedding has a row for it, and other ranks' shares of the vocabulary have none: no error comes."""
    with pytest.raises(InputError, match=r"held.bin: token id 100 is outside the model's vocabulary of 100"):
        evaluator(tmp_path, 100, 1)
