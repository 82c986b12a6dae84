"""Files to documents, in two halves, so that what is slow runs in worker processes.

`blocks` cuts a file into pieces without looking inside (a text file is one, JSON lines come in pieces of about 4 MiB, a
parquet file in row groups); `documents` parses one block. Which reader a file gets is its name's matter: `.jsonl`,
`.ndjson` and `.json` hold one JSON object a line, `.parquet` a column of text, and anything else is plain text, one
document a file; `.gz`, `.bz2`, `.xz` and `.zst` behind those (not parquet) are decompressed.

A record that cannot be read is not raised but handed over as a BadRecord, in its place: the caller stops or counts. A
file that cannot be opened at all is an InputError.
"""

import bz2
import codecs
import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import pyarrow
import pyarrow.parquet

from megatron_sbn.data.zstd_reader import ZstdReader
from megatron_sbn.errors import InputError

BLOCK_BYTES = 4 << 20
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_DECOMPRESSION_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


class Document(NamedTuple):
    """Text that UTF-8 can hold, and where it stands: `file`, `file:line` or `file:row N`."""

    text: str
    place: str


class BadRecord(NamedTuple):
    """What cannot be read: its kind (a key to count by), one line that names the place, how many records it is.

    A corrupt file is one record, however many it holds from there on: nobody can count them.
    """

    kind: Literal["invalid UTF-8", "invalid JSON", "missing field", "field is not text", "corrupt file"]
    message: str
    records: int = 1


class Block(NamedTuple):
    """A piece of a file. `first` is its first line or row, from 1; `size` its bytes on disk, for the progress bar.

    `payload` is JSON lines; None for what the worker reads itself; the message of a "bad" block.
    """

    path: str
    kind: Literal["text", "jsonl", "parquet", "bad"]
    size: int
    first: int = 1
    payload: bytes | None = None
    row_group: int = 0


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs (`**` too) name: each glob's matches sorted, no file twice.

    Raises InputError for a pattern without a match and for a folder.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        try:
            found = _matches(pattern)
        except OSError as error:
            raise _unreadable(pattern, error) from error
        except RuntimeError as error:  # the home of somebody who is not known
            raise InputError(f"{pattern}: cannot be read: {error}") from error
        if not found:
            raise InputError(f"{pattern}: no such file, and no file matches it as a glob")
        files.update(dict.fromkeys(found))
    return list(files)


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise InputError(f"{pattern}: is a folder; name its files, for instance '{path}/**/*.txt'")
    if path.exists() and not path.is_file():
        raise InputError(f"{pattern}: not a regular file")
    matches = [path] if path.is_file() else map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207 - absolute ones too
    return [match for match in matches if match.is_file()]


def blocks(path: Path) -> Iterator[Block]:
    """The pieces of one file, in order. Raises InputError where it cannot be opened."""
    try:
        size = path.stat().st_size
        with path.open("rb") as raw:
            if path.suffix == ".parquet":
                yield from _parquet_blocks(path, size)
            elif _format_suffix(path) in _JSON_LINES:
                yield from _line_blocks(path, raw, size)
            else:
                yield Block(str(path), "text", size)
    except OSError as error:
        raise _unreadable(path, error) from error


def documents(block: Block, text_field: str) -> Iterator[Document | BadRecord]:
    """What is in a block, in order. Raises InputError where the file can no longer be opened."""
    match block.kind:
        case "text":
            yield _text(block)
        case "jsonl":
            yield from _json_lines(block, text_field)
        case "parquet":
            yield from _parquet_rows(block, text_field)
        case "bad":
            yield BadRecord("corrupt file", (block.payload or b"").decode())


def _format_suffix(path: Path) -> str:
    """The suffix that tells the format: the one before a compression's."""
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _unreadable(path: str | Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read: {error.strerror or error}")


def _decompressed(raw: IO[bytes], suffix: str) -> Any:  # noqa: ANN401 - four libraries' file objects
    match suffix:
        case ".gz":
            return gzip.open(raw)
        case ".bz2":
            return bz2.open(raw)
        case ".xz":
            return lzma.open(raw)
        case ".zst":
            return ZstdReader(raw)
    return raw


def _cannot_be_decompressed(place: str, error: Exception, lost: int, size: int) -> str:
    """What is wrong, how many of a file's bytes cannot be used, and the way out."""
    share = f"{lost / 1e6:,.1f} of its {size / 1e6:,.1f} MB"
    way_out = "fetch the file again, or leave it out of --input"
    return f"{place}: cannot be decompressed: {error}; what follows ({share}) is lost: {way_out}"


def _line_blocks(path: Path, raw: IO[bytes], size: int) -> Iterator[Block]:
    """Whole lines, about BLOCK_BYTES at a time."""
    first, counted = 1, 0
    held: list[bytes] = []
    stream = None
    while True:
        try:
            stream = stream or _decompressed(raw, path.suffix)
            piece = stream.read(BLOCK_BYTES)
        except _DECOMPRESSION_ERRORS as error:
            if path.suffix not in _COMPRESSED:
                raise
            message = _cannot_be_decompressed(f"{path}:{first}", error, size - counted, size)
            yield Block(str(path), "bad", size - counted, payload=message.encode())
            return
        cut = piece.rfind(b"\n") + 1
        if cut or not piece:
            lines = b"".join([*held, piece[:cut]])
            held = []
        else:
            lines = b""
        held.append(piece[cut:])
        if lines:
            here = raw.tell()
            yield Block(str(path), "jsonl", here - counted, first, lines)
            first, counted = first + lines.count(b"\n"), here
        if not piece:
            return


def _text(block: Block) -> Document | BadRecord:
    """A whole file; a byte order mark is no part of it."""
    path = Path(block.path)
    try:
        with path.open("rb") as raw:
            content = _decompressed(raw, path.suffix).read()
    except _DECOMPRESSION_ERRORS as error:
        if path.suffix in _COMPRESSED:
            return BadRecord("corrupt file", _cannot_be_decompressed(str(path), error, block.size, block.size))
        raise _unreadable(path, error) if isinstance(error, OSError) else error from error
    try:
        return Document(content.removeprefix(codecs.BOM_UTF8).decode(), block.path)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return BadRecord("invalid UTF-8", f"{path}:{line}: invalid UTF-8 (byte 0x{error.object[error.start]:02x})")


def _json_lines(block: Block, text_field: str) -> Iterator[Document | BadRecord]:
    """One object a line; blank lines are nothing."""
    for number, line in enumerate((block.payload or b"").split(b"\n"), block.first):
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if content.strip():
            yield _json_line(content, f"{block.path}:{number}", text_field)


def _json_line(line: bytes, place: str, text_field: str) -> Document | BadRecord:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRecord(
            "invalid UTF-8", f"{place}: invalid UTF-8 (byte 0x{line[error.start]:02x} at {error.start + 1})"
        )
    except json.JSONDecodeError as error:
        return BadRecord("invalid JSON", f"{place}: not a JSON object: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets in ...
        return BadRecord("invalid JSON", f"{place}: not a JSON object: {error}")
    if not isinstance(record, dict):
        return BadRecord("invalid JSON", f"{place}: not a JSON object but a {type(record).__name__}")
    if text_field not in record:
        return _missing(place, text_field, list(record))
    return _checked(record[text_field], place, text_field)


def _missing(place: str, text_field: str, fields: Sequence[str], count: int = 1) -> BadRecord:
    names = ", ".join(fields[:8]) + (", ..." if len(fields) > 8 else "")
    message = f"{place}: no field {text_field!r} (it has: {names or 'none'}); name the text's with --text-field"
    return BadRecord("missing field", message, count)


def _checked(value: object, place: str, text_field: str) -> Document | BadRecord:
    """A document, if the value is text that UTF-8 can hold (JSON can escape half a surrogate pair)."""
    if not isinstance(value, str):
        return BadRecord("field is not text", f"{place}: field {text_field!r} is {_json_type(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return BadRecord("invalid UTF-8", f"{place}: field {text_field!r} has a lone surrogate at {error.start + 1}")
    return Document(value, place)


def _json_type(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _parquet_blocks(path: Path, size: int) -> Iterator[Block]:
    """One block a row group; a file without rows has none."""
    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        message = f"{path}: not a whole parquet file: {' '.join(str(error).split())}"
        yield Block(str(path), "bad", size, payload=message.encode())
        return
    first = 1
    for number in range(metadata.num_row_groups):
        share = size * (number + 1) // metadata.num_row_groups - size * number // metadata.num_row_groups
        yield Block(str(path), "parquet", share, first, row_group=number)
        first += metadata.row_group(number).num_rows


def _parquet_rows(block: Block, text_field: str) -> Iterator[Document | BadRecord]:
    """The rows of one row group, about 1,000 at a time in memory."""
    place = f"{block.path}:row {block.first}"
    row = block.first
    try:
        with pyarrow.parquet.ParquetFile(block.path) as file:
            rows = file.metadata.row_group(block.row_group).num_rows
            schema = file.schema_arrow
            if text_field not in schema.names:
                yield _missing(place, text_field, schema.names, rows)
                return
            kind = schema.field(text_field).type
            value_kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_string(value_kind) or pyarrow.types.is_large_string(value_kind)):
                yield BadRecord("field is not text", f"{place}: field {text_field!r} is {kind}, not text", rows)
                return
            batches = file.iter_batches(1000, row_groups=[block.row_group], columns=[text_field], use_threads=False)
            for batch in batches:
                for value in batch.column(0):
                    yield _parquet_value(value, f"{block.path}:row {row}", text_field)
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        left = max(1, block.first + rows - row) if row > block.first else 1
        message = f"{block.path}:row {row}: cannot be read: {' '.join(str(error).split())}"
        yield BadRecord("corrupt file", message, left)


def _parquet_value(value: Any, place: str, text_field: str) -> Document | BadRecord:  # noqa: ANN401 - pyarrow.Scalar
    try:
        return _checked(value.as_py(), place, text_field)
    except UnicodeDecodeError as error:
        return BadRecord("invalid UTF-8", f"{place}: field {text_field!r}: invalid UTF-8 at byte {error.start + 1}")
