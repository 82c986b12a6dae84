"""Samples cover an epoch exactly, depend on (seed, number) alone, and blends keep their weights."""

from collections import Counter

import numpy as np
import pytest

from megatron_sbn.data.dataset import (
    BLEND_PERIOD,
    BlendedDataset,
    SequentialDataset,
    TokenDataset,
    batch,
    build_dataset,
)
from megatron_sbn.errors import InputError


def _documents(count: int, seed: int = 0) -> list[list[int]]:
    """Documents of 0 to 12 tokens; every token of the corpus is unique."""
    lengths = np.random.default_rng(seed).integers(0, 13, size=count)
    ends = np.cumsum(lengths)
    return [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]


def _reference_stream(dataset: TokenDataset, epoch: int, documents: list[list[int]], length: int) -> list[np.ndarray]:
    """The epoch's samples from its definition alone: the documents' order is read off the samples themselves."""
    samples = [dataset[epoch * dataset.samples_per_epoch + i] for i in range(dataset.samples_per_epoch)]
    following = {sample[0]: sample for sample in samples}
    starts = set(following) - {sample[-1] for sample in samples}
    assert len(starts) == 1
    ordered = [following[starts.pop()]]
    while len(ordered) < len(samples):
        ordered.append(following[ordered[-1][-1]])
    assert all(len(sample) == length + 1 for sample in ordered)
    return ordered


@pytest.mark.parametrize("length", [1, 3, 7, 50])
@pytest.mark.parametrize("sequences", [1, 2])
def test_epoch_is_all_documents_cut_into_blocks(write_shard, length, sequences):
    documents = _documents(80)
    tokens = sum(map(len, documents))
    dataset = TokenDataset(write_shard("s", documents, np.int32, sequences), length, seed=5)
    assert dataset.samples_per_epoch == (tokens - 1) // length
    streams = []
    for epoch in (0, 1, 4):
        ordered = _reference_stream(dataset, epoch, documents, length)
        stream = [int(ordered[0][0]), *(int(token) for sample in ordered for token in sample[1:])]
        assert len(stream) == len(set(stream)) == dataset.samples_per_epoch * length + 1
        streams.append(stream)
        document_of = {token: number for number, document in enumerate(documents) for token in document}
        order = list(dict.fromkeys(document_of[token] for token in stream))
        whole = [token for number in order for token in documents[number]]
        assert stream[: len(whole)] == whole[: len(stream)]  # only the tail of the last documents is left out
        assert tokens - len(stream) < length
    assert streams[0] != streams[1] != streams[2]


def test_samples_do_not_come_in_stream_order(write_shard):
    dataset = TokenDataset(write_shard("s", _documents(300)), 4, seed=1)
    firsts = [int(dataset[i][0]) for i in range(dataset.samples_per_epoch)]
    lasts = [int(dataset[i][-1]) for i in range(dataset.samples_per_epoch)]
    neighbours = sum(last == first for last, first in zip(lasts, firsts[1:], strict=False))
    assert neighbours < 10


def test_pure_function_of_seed_and_number(write_shard):
    prefix = write_shard("s", _documents(60))
    forward = TokenDataset(prefix, 5, seed=9)
    numbers = list(range(3 * forward.samples_per_epoch))
    expected = [forward[number].tolist() for number in numbers]
    backward = TokenDataset(prefix, 5, seed=9)
    assert [backward[number].tolist() for number in reversed(numbers)] == expected[::-1]
    assert TokenDataset(prefix, 5, seed=9)[numbers[-1]].tolist() == expected[-1]
    for other in (TokenDataset(prefix, 5, seed=10), TokenDataset(prefix, 5, seed=9, stream=1)):
        assert [other[number].tolist() for number in numbers] != expected


def test_order_is_pinned(write_shard):
    """The very numbers, so that no release of numpy or of this project moves the batches of a run that resumes."""
    dataset = TokenDataset(write_shard("s", [[i] for i in range(12)]), 3, seed=1234)
    assert [dataset[i].tolist() for i in range(6)] == PINNED


PINNED = [[9, 7, 4, 1], [1, 10, 11, 2], [5, 6, 3, 9], [0, 2, 4, 6], [6, 5, 1, 11], [10, 7, 3, 0]]


def test_sequential_is_the_file_and_wraps(write_shard):
    documents = _documents(40)
    stream = [token for document in documents for token in document]
    dataset = TokenDataset(write_shard("s", documents), 6, shuffle=False)
    for number in range(2 * dataset.samples_per_epoch):
        start = number % dataset.samples_per_epoch * 6
        assert dataset[number].tolist() == stream[start : start + 7]


def test_sequential_dataset_over_shards(write_shard):
    first, second = _documents(40), [[1000 + i] for i in range(20)]
    dataset = SequentialDataset([write_shard("a", first), write_shard("b", second)], 6)
    count = (sum(map(len, first)) - 1) // 6
    assert len(dataset) == count + 3
    assert dataset[count - 1].tolist() == list(range((count - 1) * 6, (count - 1) * 6 + 7))
    assert dataset[count].tolist() == list(range(1000, 1007))
    assert dataset.source(count - 1).endswith("/a")
    assert dataset.source(count).endswith("/b")
    for number in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[number]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_sample_type(write_shard, dtype):
    sample = TokenDataset(write_shard("s", [[60_000, 1, 2]], dtype), 2)[0]
    assert sample.dtype == np.int64
    assert sample.tolist() == [60_000, 1, 2]


def test_too_few_tokens(write_shard):
    prefix = write_shard("s", [[1, 2], [3, 4]])
    assert TokenDataset(prefix, 3).samples_per_epoch == 1
    with pytest.raises(InputError, match=r"s.bin: 4 tokens make no sample of sequence_length 4 \+ 1"):
        TokenDataset(prefix, 4)


def test_wrong_arguments(write_shard):
    prefix = write_shard("s", [[1, 2], [3, 4]])
    for length, seed in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match="must be positive"):
            TokenDataset(prefix, length, seed)
    with pytest.raises(IndexError):
        TokenDataset(prefix, 1)[-1]


def _greedy(weights: list[float], count: int) -> list[tuple[int, int]]:
    """Largest-deficit blending from its definition: an independent reference."""
    shares = np.array(weights) / np.sum(weights)
    used = np.zeros(len(weights), dtype=np.int64)
    places = []
    for sample in range(count):
        choice = int(np.argmax(shares * max(sample, 1) - used))
        places.append((choice, int(used[choice])))
        used[choice] += 1
    return places


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.2, 0.1], [3, 1, 5, 2]])
def test_blend_is_greedy(write_shard, weights):
    datasets = [TokenDataset(write_shard(f"s{i}", [[i] * 9]), 2) for i in range(len(weights))]
    blend = BlendedDataset(datasets, weights)
    places = [blend.place(sample) for sample in range(3000)]
    assert places == _greedy(weights, 3000)
    counts = Counter(choice for choice, _ in places)
    for number, weight in enumerate(weights):
        assert abs(counts[number] - 3000 * weight / sum(weights)) <= len(weights)


def test_blend_across_periods_is_gapless_and_keeps_weights(write_shard):
    weights = [0.6, 0.3, 0.1]
    datasets = [TokenDataset(write_shard(f"s{i}", [[i] * 9]), 2) for i in range(3)]
    blend = BlendedDataset(datasets, weights)
    seam = [blend.place(sample) for sample in range(3 * BLEND_PERIOD - 2000, 3 * BLEND_PERIOD + 2000)]
    for number, weight in enumerate(weights):
        inner = [index for choice, index in seam if choice == number]
        assert inner == list(range(inner[0], inner[0] + len(inner)))
        assert abs(inner[0] - weight * (3 * BLEND_PERIOD - 2000)) < 10


def test_blend_of_samples_and_seed(write_shard):
    shards = [(write_shard("a", _documents(50)), 0.75), (write_shard("b", [[5000 + i] for i in range(100)]), 0.25)]
    blend = build_dataset(shards, 4, seed=2)
    assert isinstance(blend, BlendedDataset)
    parts = [TokenDataset(prefix, 4, 2, stream=number) for number, (prefix, _) in enumerate(shards)]
    sources = Counter()
    for sample in range(400):
        choice, inner = blend.place(sample)
        assert blend[sample].tolist() == parts[choice][inner].tolist()
        sources[blend.source(sample)] += 1
    assert sources == {shards[0][0]: 300, shards[1][0]: 100}
    single = build_dataset(shards[:1], 4, seed=2)
    assert isinstance(single, TokenDataset)
    assert single[7].tolist() == parts[0][7].tolist()


def test_the_same_shard_twice_is_not_read_in_step(write_shard):
    prefix = write_shard("a", _documents(200))
    blend = build_dataset([(prefix, 1), (prefix, 1)], 4, seed=2)
    assert sum(blend[2 * i].tolist() == blend[2 * i + 1].tolist() for i in range(50)) < 5


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_bad_weights(write_shard, weights):
    datasets = [TokenDataset(write_shard(f"s{i}", [[i] * 9]), 2) for i in range(2)]
    with pytest.raises(InputError, match="must be positive numbers"):
        BlendedDataset(datasets, weights)


def test_vanishing_weight_names_the_shard(write_shard):
    datasets = [TokenDataset(write_shard(f"s{i}", [[i] * 9]), 2) for i in range(2)]
    with pytest.raises(InputError, match=r"/s1: blend weight 1e-09 is below one sample in 1048576"):
        BlendedDataset(datasets, [1.0, 1e-9])


def test_batch_does_not_depend_on_the_number_of_readers(write_shard):
    dataset = build_dataset([(write_shard("a", _documents(90)), 2), (write_shard("b", _documents(70, 1)), 1)], 5, 3)
    for step in (0, 7, 100):
        whole = batch(dataset, step, 8, range(8))
        assert whole.shape == (8, 6)
        assert whole.dtype == np.int64
        for readers in (2, 4):
            parts = [batch(dataset, step, 8, range(reader, 8, readers)) for reader in range(readers)]
            for reader, part in enumerate(parts):
                assert np.array_equal(part, whole[reader::readers])
        assert np.array_equal(whole[3], dataset[step * 8 + 3])


def test_batch_names_the_shard_of_a_token_outside_the_vocabulary(write_shard):
    good, bad = write_shard("good", [[1] * 9]), write_shard("bad", [[1] * 8 + [500]])
    dataset = build_dataset([(good, 1), (bad, 1)], 8, 0)
    assert batch(dataset, 0, 4, range(4), vocab_size=501).shape == (4, 9)
    with pytest.raises(InputError, match=r"/bad.bin: token id 500 is outside the model's vocabulary of 500"):
        batch(dataset, 0, 4, range(4), vocab_size=500)
    negative = TokenDataset(write_shard("negative", [[1, -1, 1]]), 2)
    with pytest.raises(InputError, match=r"/negative.bin: token id -1 is outside"):
        batch(negative, 0, 1, [0], vocab_size=500)
