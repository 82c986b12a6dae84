"""Megatron's own shards open, damaged ones are refused with the file's name."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_sbn.data.dataset import TokenDataset
from megatron_sbn.data.shards import Shard, ShardWriter
from megatron_sbn.errors import InputError

DOCUMENTS = [[1, 2, 3], [], [4], list(range(5, 30)), []]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("sequences", [1, 3])
def test_reads_what_megatron_writes(write_shard, dtype, sequences):
    shard = Shard(write_shard("m", DOCUMENTS, dtype, sequences))
    assert shard.dtype == dtype
    assert shard.tokens == 29
    assert shard.document_lengths.tolist() == [3, 0, 1, 25, 0]
    assert shard.document_starts.tolist() == [0, 3, 3, 4, 29]
    assert shard.read(0, 29).tolist() == list(range(1, 30))
    assert shard.read(27, 2).tolist() == [28, 29]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, np.uint16), (65_499, np.uint16), (100_000, np.int32)])
def test_megatron_reads_what_we_write(tmp_path, vocab_size, dtype):
    writer = ShardWriter(tmp_path / "w.bin", tmp_path / "w.idx", vocab_size)
    documents = [[vocab_size - 1, 0, 2], [7]]
    for document in documents:
        writer.add(np.array(document, dtype=np.int32))
    writer.finish()
    reader = IndexedDataset(str(tmp_path / "w"))
    assert reader.index.dtype == dtype
    assert [reader[i].tolist() for i in range(len(reader))] == documents
    assert reader.document_indices.tolist() == [0, 1, 2]
    assert (writer.documents, writer.tokens) == (2, 4)


def test_merged_and_multimodal_shards(write_shard, tmp_path):
    first, second = write_shard("a", [[1, 2], [3]]), write_shard("b", [[4, 5, 6]])
    merged = IndexedDatasetBuilder(str(tmp_path / "ab.bin"))
    merged.add_index(first)
    merged.add_index(second)
    merged.finalize(str(tmp_path / "ab.idx"))
    assert Shard(tmp_path / "ab").document_lengths.tolist() == [2, 1, 3]
    modal = IndexedDatasetBuilder(str(tmp_path / "mm.bin"), multimodal=True)
    modal.add_document(np.arange(5), [2, 3], [0, 1])
    modal.finalize(str(tmp_path / "mm.idx"))
    assert Shard(tmp_path / "mm").read(0, 5).tolist() == [0, 1, 2, 3, 4]


def test_missing_files(write_shard, tmp_path):
    with pytest.raises(InputError, match=r"none.idx: no such token shard"):
        Shard(tmp_path / "none")
    prefix = write_shard("m", DOCUMENTS)
    with pytest.raises(InputError, match=r"m.bin.idx: no such token shard; name the shard without .bin"):
        Shard(f"{prefix}.bin")
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(InputError, match=r"m.bin: no such token shard"):
        Shard(prefix)


def test_every_cut_of_the_index_is_refused(write_shard):
    prefix = write_shard("m", DOCUMENTS)
    index = Path(f"{prefix}.idx")
    whole = index.read_bytes()
    for size in range(len(whole)):
        index.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"m\.idx: "):
            Shard(prefix)
    index.write_bytes(whole)
    assert Shard(prefix).tokens == 29


def _damage(prefix: str, offset: int, content: bytes) -> None:
    index = Path(f"{prefix}.idx")
    whole = bytearray(index.read_bytes())
    whole[offset : offset + len(content)] = content
    index.write_bytes(whole)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"XX", "not a Megatron index"),
        (9, struct.pack("<Q", 2), "not a Megatron index"),
        (17, b"\x06", "dtype code 6 is no integer type"),
        (17, b"\x63", "dtype code 99 is no integer type"),
        (18, struct.pack("<Q", 2**62), "cut or corrupt"),
        (26, struct.pack("<Q", 2), "cut or corrupt"),
        (34, struct.pack("<i", -3), "corrupt index"),
        (34, struct.pack("<i", 4), "corrupt index"),
        (34 + 4 * 5 + 8, struct.pack("<q", 2**40), "corrupt index"),
        (34 + 12 * 5, struct.pack("<q", 1), "corrupt index"),
        (34 + 12 * 5 + 8, struct.pack("<q", 9), "corrupt index"),
        (34 + 12 * 5 + 40, struct.pack("<q", 4), "corrupt index"),
    ],
)
def test_corrupt_index(write_shard, offset, content, message):
    prefix = write_shard("m", DOCUMENTS)
    _damage(prefix, offset, content)
    with pytest.raises(InputError, match=rf"m\.idx: .*{message}"):
        Shard(prefix)


@pytest.mark.parametrize("size", [0, 1, 115, 117, 232])
def test_bin_of_another_size(write_shard, size):
    prefix = write_shard("m", DOCUMENTS)
    Path(f"{prefix}.bin").write_bytes(bytes(size))
    with pytest.raises(InputError, match=rf"m\.bin: {size} bytes where the index has 116"):
        Shard(prefix)


def test_shard_without_tokens(write_shard):
    with pytest.raises(InputError, match=r"e\.bin: the shard holds no tokens"):
        Shard(write_shard("e", [[], []]))
    with pytest.raises(InputError, match=r"n\.(bin|idx): "):
        Shard(write_shard("n", []))


def test_files_of_two_runs(write_shard):
    first, second = write_shard("a", [[1, 2, 3]]), write_shard("b", [[1, 2]])
    shutil.copy(f"{first}.idx", f"{second}.idx")
    with pytest.raises(InputError, match=r"b\.bin: 8 bytes where the index has 12"):
        TokenDataset(second, 1)


def test_a_shard_that_is_cut_short_or_gone_while_it_is_open(write_shard):
    """A file that is gone is still there for who has it open; one that is cut short is named, instead of a SIGBUS."""
    prefix = write_shard("m", DOCUMENTS, np.int32)
    shard, cut = Shard(prefix), Shard(prefix)
    with Path(f"{prefix}.bin").open("r+b") as file:
        file.truncate(4 * 20 + 1)
    assert cut.read(0, 20).tolist() == list(range(1, 21))
    with pytest.raises(InputError, match=r"m.bin: ends at byte 81, its index needs more; write it again"):
        cut.read(10, 15)
    Path(f"{prefix}.bin").unlink()
    assert shard.read(0, 3).tolist() == [1, 2, 3]
    with pytest.raises(InputError, match=r"m.bin"):
        Shard(prefix)
