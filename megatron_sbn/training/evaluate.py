"""Validation loss and perplexity over samples of the held-out shards: the same tokens every time.

    sample i of n: number floor(i * available / n)        spread evenly: the first ones are of a few documents only

validation_loss          = mean over tokens of cross-entropy;  validation_perplexity = exp(validation_loss)
validation_loss_stderr   = standard deviation of the samples' losses / sqrt(samples)
validation_bits_per_byte = validation_loss / ln 2 / bytes of text that a token stands for

What a token stands for, and the baseline of token frequencies, are in the shards' manifest (data/manifest.py); what is
not written down there is left out.
"""

import math
from collections import Counter
from collections.abc import Sequence

from megatron_sbn.config import Recipe
from megatron_sbn.data.dataset import SequentialDataset, batch
from megatron_sbn.data.manifest import ShardFacts, shard_facts
from megatron_sbn.errors import InputError
from megatron_sbn.parallel.state import ParallelState
from megatron_sbn.training.step import Trainer


class Evaluator:
    """Holds this replica's share of the validation samples.

    `training.validation_samples` of them are used, or as many as there are, rounded down to whole micro-batches on
    every replica. Raises InputError where the shards hold fewer than one round of micro-batches, or a token that is
    outside the model's vocabulary.
    """

    def __init__(self, recipe: Recipe, parallel: ParallelState) -> None:
        validation = recipe.data.validation
        assert validation is not None
        dataset = SequentialDataset([shard.path for shard in validation], recipe.model.seq_length)
        # Interleaved schedules want a multiple of the pipeline's size in micro-batches.
        micro_batches = parallel.pipeline.size if recipe.parallel.virtual_pipeline else 1
        unit = recipe.training.micro_batch_size * parallel.data.size * micro_batches
        available = min(recipe.training.validation_samples, len(dataset))
        count = available // unit * unit
        if count == 0:
            raise InputError(
                f"data.validation: {available} samples of {recipe.model.seq_length} tokens do not fill one round of "
                f"micro-batches ({unit}); give more text or lower training.micro_batch_size"
            )
        share = count // parallel.data.size
        spread = [number * len(dataset) // count for number in range(count)]
        rows = spread[parallel.data.rank * share : (parallel.data.rank + 1) * share]
        self._samples = batch(dataset, 0, count, rows, vocab_size=recipe.model.vocab_size)  # [share, tokens + 1]
        self._last: dict[str, float] = {}
        facts = {shard.path: shard_facts(shard.path) for shard in validation}
        uses = Counter(dataset.source(index) for index in spread)
        self.bytes_per_token = _mean([(facts[path], count) for path, count in uses.items()], "bytes_per_token")
        self.unigram_loss = _mean([(facts[path], count) for path, count in uses.items()], "unigram_loss")

    def run(self, trainer: Trainer) -> dict[str, float]:
        """The metrics, equal on every rank."""
        loss, error = trainer.evaluate_with_error(self._samples)
        self._last = {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))}
        if error is not None:
            self._last["validation_loss_stderr"] = error
        if self.bytes_per_token is not None:
            self._last["validation_bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        return dict(self._last)

    def summary(self) -> str:
        """The last validation and the baseline that it should beat, for people; empty before the first."""
        if not self._last:
            return ""
        parts = [f"perplexity {self._last['validation_perplexity']:.3f}"]
        if "validation_loss_stderr" in self._last:
            parts[0] += f" (loss {self._last['validation_loss']:.4f} +- {self._last['validation_loss_stderr']:.4f})"
        if self.bytes_per_token is not None:
            parts.append(f"{self._last['validation_bits_per_byte']:.4f} bits a byte")
        if self.unigram_loss is not None:
            bits = self.unigram_loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None
            each = "" if bits is None else f", {bits:.4f} bits a byte"
            parts.append(f"token frequencies alone: perplexity {math.exp(self.unigram_loss):.1f}{each}")
        return "; ".join(parts)


def _mean(uses: Sequence[tuple[ShardFacts | None, int]], name: str) -> float | None:
    """The mean over samples of what is known of their shards; None where it is not known of one. Uses are counts."""
    total = 0.0
    for facts, count in uses:
        value = getattr(facts, name, None)
        if value is None:
            return None
        total += value * count
    return total / sum(count for _, count in uses)
