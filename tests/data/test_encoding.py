"""Blocks to tokens: documents in order, a fair and stable split, bounded work under way."""

import concurrent.futures
import errno
import json

import numpy as np
import pytest

from megatron_sbn.data import encoding
from megatron_sbn.data.encoding import EncodingJob, encode_block, encode_files, is_held_out
from megatron_sbn.data.readers import Block


@pytest.fixture
def job(tokenizer):
    return EncodingJob(str(tokenizer.path), "digest", "text", 0.5, 3)


def test_encode_block(job, tokenizer):
    texts = ["one two", "", "\u20ac\n", "three"]
    lines = [json.dumps({"text": text}) for text in texts]
    encoded = encode_block(job, Block("a.jsonl", "jsonl", 77, payload="\n".join([*lines, "{"]).encode()))
    kept = [text for text in texts if text]
    ids = [[*tokenizer.encode(text), tokenizer.eod] for text in kept]
    assert encoded.tokens.dtype == np.int32
    assert encoded.tokens.tolist() == [token for document in ids for token in document]
    assert encoded.lengths.tolist() == [len(document) for document in ids]
    assert encoded.held_out.tolist() == [is_held_out(text, 0.5, 3) for text in kept]
    assert encoded.text_bytes.tolist() == [7, 4, 5]
    assert (encoded.unknown, encoded.empty, encoded.size) == (0, 1, 77)
    assert [record.kind for record in encoded.bad] == ["invalid JSON"]


def test_split_is_fair_and_depends_on_the_seed():
    texts = [f"document {number}" for number in range(20_000)]
    sides = {seed: [is_held_out(text, 0.05, seed) for text in texts] for seed in (0, 1)}
    for chosen in sides.values():
        assert abs(sum(chosen) - 1000) < 4 * np.sqrt(20_000 * 0.05 * 0.95)
    assert abs(sum(a and b for a, b in zip(sides[0], sides[1], strict=True)) - 50) < 30
    larger = [is_held_out(text, 0.1, 0) for text in texts]
    assert all(more or not some for some, more in zip(sides[0], larger, strict=True))
    assert not any(is_held_out(text, 0.0, 0) for text in texts)


def test_split_is_pinned():
    """The very choices, so that no release moves a document from one side to the other."""
    assert "".join("ab"[is_held_out(f"document {number}", 0.5, 1234)] for number in range(24)) == PINNED


def test_reading_does_not_run_ahead(job, tmp_path, monkeypatch):
    taken = 0

    def endless(path):
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield Block(str(path), "jsonl", 1, payload=b'{"text": "a"}')

    monkeypatch.setattr(encoding, "blocks", endless)
    results = encode_files([tmp_path / "a.jsonl"], job, workers=2)
    for number in range(1, 30):
        assert next(results).lengths.tolist() == [2]
        assert taken <= number + 8
    results.close()


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system"), ImportError("no sem_open")])
def test_no_shared_memory_means_one_process(job, tmp_path, monkeypatch, capsys, tokenizer, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", refuse)
    (tmp_path / "a.txt").write_text("a")
    (encoded,) = encode_files([tmp_path / "a.txt"], job, workers=2)
    assert encoded.tokens.tolist() == [*tokenizer.encode("a"), tokenizer.eod]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sbn: warning: --workers 2 takes semaphores in /dev/shm, which cannot be made (")
    assert line.endswith("tokenizing with one process")


PINNED = "babbbbbaabbabababaabbbaa"
