"""Shards to training samples: a pure function of (seed, sample number), whatever the number of steps.

Epoch k of a shard is all its documents in an order drawn from (seed, k), as one stream of T tokens. Its sample i is

    stream[i*S : i*S + S + 1]        0 <= i < (T - 1) // S

(S inputs, and the labels one further: neighbours share one token, so every token but the epoch's first and its tail is
a label once). The samples of an epoch come in an order drawn from (seed, k) too. Megatron-Core's GPTDataset shuffles
all epochs of a run at once, so its batches change with the number of samples asked for; these do not.

Blends give sample g to the shard that is furthest behind its weight (Megatron-Core's greedy rule), for the first 2^20
samples; then the pattern repeats. So the choice for g needs neither the length of the run nor memory that grows with g,
and shares are exact to about 1e-6.

Orders are stable sorts of PCG64's raw 64-bit output: numpy keeps that stream fixed across releases, which it does not
promise for `Generator.permutation`.
"""

import bisect
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from megatron_sbn.data.shards import Shard, blending_pattern
from megatron_sbn.errors import InputError
from megatron_sbn.launch.open_files import allow_open_files

BLEND_PERIOD = 1 << 20
_DOCUMENTS, _SAMPLES = 0, 1


class Dataset(Protocol):
    """Numbered samples of `sequence_length` + 1 tokens, and the shard that each comes from."""

    sequence_length: int

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index`: int64 [sequence_length + 1]."""

    def source(self, index: int) -> str:
        """Prefix of the shard that sample `index` comes from."""


class _Epoch(NamedTuple):
    """One pass over a shard: documents in order, where each ends in the stream, samples in order (None: as is)."""

    documents: np.ndarray  # [documents]
    ends: np.ndarray  # [documents], tokens
    samples: np.ndarray | None  # [samples_per_epoch]


class TokenDataset:
    """Endless samples of one shard; with `shuffle=False` every epoch is the shard from its start to its end.

    `samples_per_epoch` = (tokens - 1) // sequence_length. `stream` sets apart datasets of one seed (the shards of a
    blend). Memory: 24 bytes a document and 8 a sample for each of the two epochs kept. Raises InputError for a shard
    that is missing, damaged, or shorter than one sample.
    """

    def __init__(
        self, prefix: str | Path, sequence_length: int, seed: int = 0, *, shuffle: bool = True, stream: int = 0
    ) -> None:
        if sequence_length < 1 or seed < 0:
            raise ValueError(f"sequence_length {sequence_length} must be positive and seed {seed} not negative")
        self.shard = Shard(prefix)
        self.sequence_length = sequence_length
        self.samples_per_epoch = (self.shard.tokens - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise InputError(
                f"{prefix}.bin: {self.shard.tokens} tokens make no sample of sequence_length {sequence_length} + 1; "
                "give more text or a shorter sequence_length"
            )
        self._shuffle = shuffle
        self._entropy = (seed, stream)
        self._epoch = functools.lru_cache(maxsize=2)(self._build_epoch)

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index` >= 0: int64 [sequence_length + 1]. Raises IndexError for a negative one."""
        if index < 0:
            raise IndexError(f"sample {index}: samples are numbered from 0")
        number, position = divmod(int(index), self.samples_per_epoch)
        epoch = self._epoch(number if self._shuffle else 0)
        sample = position if epoch.samples is None else int(epoch.samples[position])
        return self._tokens(epoch, sample * self.sequence_length, self.sequence_length + 1)

    def source(self, index: int) -> str:
        """Prefix of the shard."""
        return self.shard.prefix

    def _tokens(self, epoch: _Epoch, start: int, count: int) -> np.ndarray:
        """Tokens start to start + count of the epoch's stream: int64 [count]."""
        result = np.empty(count, dtype=np.int64)
        filled = 0
        place = int(np.searchsorted(epoch.ends, start, side="right"))
        while filled < count:
            document = epoch.documents[place]
            length = int(self.shard.document_lengths[document])
            offset = start + filled - (int(epoch.ends[place]) - length)
            take = min(length - offset, count - filled)
            first = int(self.shard.document_starts[document]) + offset
            result[filled : filled + take] = self.shard.read(first, take)
            filled += take
            place += 1
        return result

    def _build_epoch(self, number: int) -> _Epoch:
        documents = np.arange(len(self.shard.document_lengths))
        samples = None
        if self._shuffle:
            documents = _order((*self._entropy, number, _DOCUMENTS), len(documents))
            samples = _order((*self._entropy, number, _SAMPLES), self.samples_per_epoch)
        return _Epoch(documents, np.cumsum(self.shard.document_lengths[documents]), samples)


class BlendedDataset:
    """Samples of several datasets in proportion to `weights` (any positive numbers; they are normalized).

    Every dataset is read in its own order: its j-th use is its sample j. Raises InputError for weights that are not
    positive and finite, or so small that they are less than one sample in BLEND_PERIOD.
    """

    def __init__(self, datasets: Sequence[TokenDataset], weights: Sequence[float]) -> None:
        shares = np.asarray(weights, dtype=np.float64)
        if len(datasets) != len(weights) or not datasets:
            raise ValueError(f"{len(datasets)} datasets and {len(weights)} weights: one each, and at least one")
        if not (np.all(np.isfinite(shares)) and np.all(shares > 0)):
            raise InputError(f"blend weights {list(weights)} must be positive numbers")
        if len({dataset.sequence_length for dataset in datasets}) != 1:
            raise ValueError("the datasets of a blend must have one sequence_length")
        self.sequence_length = datasets[0].sequence_length
        self._datasets = tuple(datasets)
        shares = shares / shares.sum()
        if shares.min() * BLEND_PERIOD < 1:
            least = int(shares.argmin())
            raise InputError(
                f"{datasets[least].shard.prefix}: blend weight {weights[least]} is below one sample in "
                f"{BLEND_PERIOD}; raise it or leave the shard out"
            )
        self._choice, self._rank = blending_pattern(shares, BLEND_PERIOD)
        self._uses = np.bincount(self._choice, minlength=len(datasets))  # [datasets], in one period

    def place(self, index: int) -> tuple[int, int]:
        """(dataset, index in it) of sample `index` >= 0."""
        if index < 0:
            raise IndexError(f"sample {index}: samples are numbered from 0")
        period, position = divmod(int(index), BLEND_PERIOD)
        choice = int(self._choice[position])
        return choice, period * int(self._uses[choice]) + int(self._rank[position])

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index`: int64 [sequence_length + 1]."""
        choice, inner = self.place(index)
        return self._datasets[choice][inner]

    def source(self, index: int) -> str:
        """Prefix of the shard that sample `index` comes from."""
        return self._datasets[self.place(index)[0]].shard.prefix


class SequentialDataset:
    """Every sample of every shard once, in order: what a validation loss is the mean of. `len` says how many."""

    def __init__(self, prefixes: Sequence[str | Path], sequence_length: int) -> None:
        if not prefixes:
            raise ValueError("a sequential dataset needs at least one shard")
        self.sequence_length = sequence_length
        allow_open_files(len(prefixes))
        self._datasets = [TokenDataset(prefix, sequence_length, shuffle=False) for prefix in prefixes]
        self._ends = list(itertools.accumulate(dataset.samples_per_epoch for dataset in self._datasets))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample 0 <= index < len(self): int64 [sequence_length + 1]."""
        dataset, inner = self._place(index)
        return dataset[inner]

    def source(self, index: int) -> str:
        """Prefix of the shard that sample `index` comes from."""
        return self._place(index)[0].shard.prefix

    def _place(self, index: int) -> tuple[TokenDataset, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        return self._datasets[number], int(index) - (self._ends[number - 1] if number else 0)


def build_dataset(
    shards: Sequence[tuple[str | Path, float]], sequence_length: int, seed: int
) -> TokenDataset | BlendedDataset:
    """The training samples of (prefix, weight) shards. A single shard's weight is of no consequence.

    Raises InputError for what is wrong with a shard or a weight.
    """
    allow_open_files(len(shards))
    datasets = [TokenDataset(prefix, sequence_length, seed, stream=number) for number, (prefix, _) in enumerate(shards)]
    if len(datasets) == 1:
        return datasets[0]
    return BlendedDataset(datasets, [weight for _, weight in shards])


def batch(
    dataset: Dataset, step: int, global_batch_size: int, rows: Sequence[int], *, vocab_size: int | None = None
) -> np.ndarray:
    """Samples step * global_batch_size + rows: int64 [len(rows), sequence_length + 1].

    `rows` (0 <= row < global_batch_size) are those of this rank: the batch of a step does not depend on who reads it.
    With `vocab_size`, a token outside 0 <= id < vocab_size is an InputError that names its shard.
    """
    indices = [step * global_batch_size + row for row in rows]
    tokens = np.stack([dataset[index] for index in indices])  # [rows, sequence_length + 1]
    if vocab_size is not None:
        outside = (tokens < 0) | (tokens >= vocab_size)
        if outside.any():
            row = int(outside.any(axis=1).argmax())
            raise InputError(
                f"{dataset.source(indices[row])}.bin: token id {tokens[row][outside[row]][0]} is outside the model's "
                f"vocabulary of {vocab_size}; use the tokenizer that wrote the shard, or raise model.vocab_size"
            )
    return tokens


def _order(entropy: tuple[int, ...], count: int) -> np.ndarray:
    """A permutation of range(count) drawn from `entropy`: the same with every release of numpy."""
    raw = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)
    return np.argsort(raw, kind="stable")
