"""Token shards: Megatron-Core's own `.bin/.idx` pairs, written and read through Megatron-Core (its only importer here).

Layout of `.idx`, little endian: `MMIDIDX\\0\\0`, version 1 (uint64), dtype code (uint8), sequences n (uint64), document
marks d (uint64), then lengths int32 [n], byte offsets int64 [n], marks int64 [d] (document i is the sequences mark[i]
to mark[i+1]), and, in multimodal shards only, modes int8 [n]. `.bin` is the tokens, nothing else.

Megatron-Core asserts or reads past the end where a file is cut, so everything that its reader relies on is checked here
first, once, in O(documents): a damaged file is an InputError that names it.
"""

import contextlib
import os
import warnings
from pathlib import Path

import numpy as np

from megatron_sbn.data.index_header import HEADER, MAGIC, REMEDY
from megatron_sbn.errors import InputError

with warnings.catch_warnings():  # on import Megatron-Core warns that Transformer Engine and apex are absent: by design
    warnings.simplefilter("ignore")
    from megatron.core.datasets.helpers import build_blending_indices
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder


class Shard:
    """A shard. Tokens are numbered 0 to `tokens` in the order of the file.

    Tokens are read from the open file and not through a memory map, in which a file that was cut short meanwhile would
    end the process by a signal without a word.

    `document_lengths` and `document_starts` are int64 [documents], in tokens. Raises InputError for a missing, damaged
    or empty pair of files, and for tokens that are no integers.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        _check_files(self.prefix)
        indexed = IndexedDataset(self.prefix, mmap=False)  # not kept: it holds its index open
        self._file = Path(f"{self.prefix}.bin").open("rb", buffering=0)  # noqa: SIM115 - for as long as the shard lives
        self.dtype = np.dtype(indexed.index.dtype)
        marks = np.asarray(indexed.document_indices)
        ends = np.concatenate([[0], np.cumsum(indexed.sequence_lengths, dtype=np.int64)])  # [sequences + 1]
        self.document_starts: np.ndarray = ends[marks[:-1]]
        self.document_lengths: np.ndarray = np.diff(ends[marks])
        self.tokens = int(ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start to start + count, in the dtype of the file. Bounds are the caller's.

        Raises InputError where the file cannot be read any more, or is shorter than its index says.
        """
        size, offset = count * self.dtype.itemsize, start * self.dtype.itemsize
        try:
            data = os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise InputError(f"{self.prefix}.bin: cannot be read: {error.strerror or error}") from None
        if len(data) < size:
            raise InputError(f"{self.prefix}.bin: ends at byte {offset + len(data)}, its index needs more; {REMEDY}")
        return np.frombuffer(data, dtype=self.dtype)


class ShardWriter:
    """Writes one shard, document by document, in the smallest dtype that Megatron-Core has for `vocab_size`.

    The files are whole once `finish` has returned. Raises OSError where they cannot be written.
    """

    def __init__(self, bin_path: Path, idx_path: Path, vocab_size: int) -> None:
        self.documents = 0
        self.tokens = 0
        self._idx_path = idx_path
        self._builder = IndexedDatasetBuilder(str(bin_path), dtype=DType.optimal_dtype(vocab_size))

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, int [tokens], its end-of-document token included."""
        self._builder.add_document(tokens, [len(tokens)])
        self.documents += 1
        self.tokens += len(tokens)

    def finish(self) -> None:
        """Write what is buffered, and the index."""
        self._builder.finalize(str(self._idx_path))

    def abandon(self) -> None:
        """Close the file without an index; the caller removes it."""
        with contextlib.suppress(OSError):
            self._builder.data_file.close()


def blending_pattern(shares: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Megatron-Core's blend of `count` samples: (dataset int16 [count], its earlier uses int64 [count]).

    Sample g goes to the dataset with the largest max(g, 1) * share - uses so far, the first of equals. `shares`
    (float64 [datasets]) sum to 1.
    """
    choice, uses = np.zeros(count, dtype=np.int16), np.zeros(count, dtype=np.int64)
    build_blending_indices(choice, uses, shares, len(shares), count, False)
    return choice, uses


def _check_files(prefix: str) -> None:
    """InputError unless the pair is one that Megatron-Core's reader can read to the last token."""
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (idx_path, bin_path):
        if not path.is_file():
            name = Path(prefix).name
            hint = f"; name the shard without {name[-4:]}" if name.endswith((".bin", ".idx")) else ""
            raise InputError(f"{path}: no such token shard{hint or '; `sbn prepare` writes one'}")
    try:
        index = np.memmap(idx_path, mode="r") if idx_path.stat().st_size else np.empty(0, np.uint8)
        bin_bytes = bin_path.stat().st_size
        with bin_path.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"{error.filename or prefix}: cannot read the token shard: {error.strerror}") from error
    itemsize, sequences, documents = _check_header(idx_path, index)
    lengths = index[HEADER.size :][: 4 * sequences].view(np.int32)
    offsets = index[HEADER.size + 4 * sequences :][: 8 * sequences].view(np.int64)
    marks = index[HEADER.size + 12 * sequences :][: 8 * documents].view(np.int64)
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    ordered = marks.size > 0 and marks[0] == 0 and marks[-1] == sequences and bool(np.all(np.diff(marks) >= 0))
    contiguous = bool(np.all(lengths >= 0)) and bool(np.all(offsets == ends - lengths.astype(np.int64) * itemsize))
    if not (ordered and contiguous):
        raise InputError(f"{idx_path}: corrupt index: its documents are not one behind the other; {REMEDY}")
    expected = int(ends[-1]) if sequences else 0
    if bin_bytes != expected:
        raise InputError(
            f"{bin_path}: {bin_bytes} bytes where the index has {expected}: cut or from another run; {REMEDY}"
        )
    if expected == 0:
        raise InputError(f"{bin_path}: the shard holds no tokens; {REMEDY}")


def _check_header(idx_path: Path, index: np.ndarray) -> tuple[int, int, int]:
    """(bytes per token, sequences, document marks) of an index whose size fits its own header."""
    if index.size < HEADER.size:
        raise InputError(f"{idx_path}: {index.size} bytes, too short for an index; {REMEDY}")
    magic, version, code, sequences, documents = HEADER.unpack(index[: HEADER.size].tobytes())
    if magic != MAGIC or version != 1:
        raise InputError(f"{idx_path}: not a Megatron index (MMIDIDX, version 1); {REMEDY}")
    if code not in {member.value for member in DType} or not np.issubdtype(DType.dtype_from_code(code), np.integer):
        raise InputError(f"{idx_path}: dtype code {code} is no integer type of Megatron's; {REMEDY}")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if index.size not in (expected, expected + sequences):
        raise InputError(
            f"{idx_path}: {index.size} bytes where its header asks for {expected}: cut or corrupt; {REMEDY}"
        )
    return DType.size(code), sequences, documents
