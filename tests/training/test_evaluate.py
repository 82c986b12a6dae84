"""Validation samples: which are taken, and what is refused before training."""

import json
import math
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


def evaluator(folder: Path, last_token: int, data_rank: int, tokens: int = 64) -> Evaluator:
    """That of one of two replicas; the shard has 64 tokens, and one more."""
    writer = ShardWriter(folder / "held.bin", folder / "held.idx", 1000)
    writer.add(np.array([*(number % 100 for number in range(tokens)), last_token]))
    writer.finish()
    (folder / "base.yaml").write_text(RECIPE.replace("SHARD", str(folder / "held")))
    parallel = mock.Mock(data=mock.Mock(rank=data_rank, size=2), pipeline=mock.Mock(size=1))
    return Evaluator(load_recipe(folder / "base.yaml"), parallel)


def test_replicas_share_the_samples(tmp_path: Path) -> None:
    samples = [evaluator(tmp_path, 99, rank)._samples for rank in (0, 1)]
    assert np.concatenate(samples)[:, 0].tolist() == [0, 16, 32, 48]
    assert samples[1][-1].tolist() == [*range(48, 64), 99]


def test_samples_are_spread_over_all_of_the_text(tmp_path: Path) -> None:
    samples = [evaluator(tmp_path, 99, rank, tokens=16 * 10)._samples for rank in (0, 1)]
    assert np.concatenate(samples)[:, 0].tolist() == [0, 32, 80, 112 % 100]  # samples 0, 2, 5 and 7 of 10


def test_what_the_manifest_knows(tmp_path: Path) -> None:
    trainer = mock.Mock()
    trainer.evaluate_with_error.return_value = (2.0, 0.25)
    made = evaluator(tmp_path, 99, 0)
    assert made.summary() == ""
    assert made.run(trainer) == {
        "validation_loss": 2.0, "validation_perplexity": math.exp(2.0), "validation_loss_stderr": 0.25
    }  # fmt: skip
    assert made.summary() == "perplexity 7.389 (loss 2.0000 +- 0.2500)"
    own = {"tokens": 65, "text_bytes": 130, "unigram_loss": 3.0}
    facts = {"tokenizer": "t", "tokenizer_sha256": "0", "vocab_size": 100, "splits": {"train": own}}
    (tmp_path / "held.json").write_text(json.dumps(facts | {"files": {"held.bin": 130}}))
    made = evaluator(tmp_path, 99, 0)
    trainer.evaluate_with_error.return_value = (2.0, None)
    assert made.run(trainer) == {
        "validation_loss": 2.0,
        "validation_perplexity": math.exp(2.0),
        "validation_bits_per_byte": pytest.approx(1 / math.log(2)),
    }
    assert made.summary() == (
        "perplexity 7.389; 1.4427 bits a byte; token frequencies alone: perplexity 20.1, 2.1640 bits a byte"
    )


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """The padded embedding has a row for it, and other ranks' shares of the vocabulary have none: no error comes."""
    with pytest.raises(InputError, match=r"held.bin: token id 100 is outside the model's vocabulary of 100"):
        evaluator(tmp_path, 100, 1)
