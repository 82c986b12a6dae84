"""Validation loss and perplexity over the first samples of the held-out shards: the same tokens every time.

validation_loss = mean over tokens of cross-entropy;  validation_perplexity = exp(validation_loss)
"""

import math

from megatron_sbn.config import Recipe
from megatron_sbn.data.dataset import SequentialDataset, batch
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
        rows = range(parallel.data.rank * share, (parallel.data.rank + 1) * share)
        self._samples = batch(dataset, 0, count, rows, vocab_size=recipe.model.vocab_size)  # [share, tokens + 1]

    def run(self, trainer: Trainer) -> dict[str, float]:
        """The two metrics, equal on every rank."""
        loss = trainer.evaluate(self._samples)
        return {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))}
