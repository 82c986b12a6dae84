"""Every format gives its documents with their place; everything that is bad is reported with file and line."""

import bz2
import errno
import gzip
import json
import lzma
import os
import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_sbn.data import readers
from megatron_sbn.data.readers import BadRecord, Document, blocks, documents, expand_inputs
from megatron_sbn.data.zstd_reader import ZstdReader
from megatron_sbn.errors import InputError


def read(path, field="text"):
    return [item for block in blocks(path) for item in documents(block, field)]


def lines(*records):
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a", "a.md"])
def test_plain_text_is_one_document_byte_for_byte(tmp_path, name):
    path = tmp_path / name
    path.write_bytes("\ufeffline 1\r\nline 2\0\n\u20ac".encode())
    assert read(path) == [Document("line 1\r\nline 2\0\n\u20ac", str(path))]


def test_invalid_utf8_in_text_names_the_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nth\xffree\n")
    assert read(path) == [BadRecord("invalid UTF-8", f"{path}:3: invalid UTF-8 (byte 0xff)")]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines({"text": "a\nb"}) + b"\n  \n" + lines({"body": "x", "text": "\u20ac"}))
    assert read(path) == [Document("a\nb", f"{path}:1"), Document("\u20ac", f"{path}:4")]
    path.write_bytes(b'{"body": "last line without an end"}\r\n{"body": ""}')
    assert read(path, "body") == [Document("last line without an end", f"{path}:1"), Document("", f"{path}:2")]


BAD_LINES = [
    (b'{"text": "\xff"}', "invalid UTF-8", r":2: invalid UTF-8 \(byte 0xff at 11\)"),
    (b'{"text": "a"', "invalid JSON", r":2: not a JSON object: Expecting ',' delimiter at column 13"),
    (b"[" * 100_000, "invalid JSON", r":2: not a JSON object: .*recursion"),
    (b'{"text": ' + b"1" * 5000 + b"}", "invalid JSON", r":2: not a JSON object: Exceeds the limit"),
    (b'["text"]', "invalid JSON", r":2: not a JSON object but a list"),
    (b'"text"', "invalid JSON", r":2: not a JSON object but a str"),
    (b'{"body": "a", "id": 3}', "missing field", r":2: no field 'text' \(it has: body, id\); .* --text-field"),
    (b"{}", "missing field", r":2: no field 'text' \(it has: none\)"),
    (b'{"text": null}', "field is not text", r":2: field 'text' is null, not text"),
    (b'{"text": ["a"]}', "field is not text", r":2: field 'text' is list, not text"),
    (b'{"text": "ab\\ud800"}', "invalid UTF-8", r":2: field 'text' has a lone surrogate at 3"),
]


@pytest.mark.parametrize(("line", "kind", "message"), BAD_LINES)
def test_bad_json_line(tmp_path, line, kind, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": "before"}) + line + b"\n" + lines({"text": "after"}))
    before, bad, after = read(path)
    assert (before.text, after) == ("before", Document("after", f"{path}:3"))
    assert bad.kind == kind
    assert bad.records == 1
    with pytest.raises(InputError, match="^" + str(path).replace(".", r"\.") + message):
        raise InputError(bad.message)
    assert "\n" not in bad.message


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 1 << 22])
def test_blocks_do_not_show(tmp_path, monkeypatch, size):
    path = tmp_path / "a.jsonl"
    texts = ["x" * (number * 7 % 150) + "\u20ac\n" for number in range(60)]
    path.write_bytes(lines(*({"text": text} for text in texts)))
    monkeypatch.setattr(readers, "BLOCK_BYTES", size)
    pieces = list(blocks(path))
    assert sum(block.size for block in pieces) == path.stat().st_size
    assert len(pieces) > 1 or size == 1 << 22
    assert read(path) == [Document(text, f"{path}:{number}") for number, text in enumerate(texts, 1)]


def _zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix](lines({"text": "one"}, {"text": "two"})))
    assert read(path) == [Document("one", f"{path}:1"), Document("two", f"{path}:2")]
    assert sum(block.size for block in blocks(path)) == path.stat().st_size
    text = tmp_path / f"a.txt{suffix}"
    text.write_bytes(COMPRESSORS[suffix](b"one\ntwo"))
    assert read(text) == [Document("one\ntwo", str(text))]


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_compression(tmp_path, suffix, damage):
    whole = COMPRESSORS[suffix](lines(*({"text": os.urandom(40).hex()} for _ in range(500))))
    for name in (f"a.jsonl{suffix}", f"a.txt{suffix}"):
        path = tmp_path / name
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"this is not compressed" * 9)
        bad = read(path)[-1]
        assert isinstance(bad, BadRecord)
        assert bad.kind == "corrupt file"
        assert bad.message.startswith(str(path))


def _long_window(content, window):
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=window, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return stream.compress(content) + stream.flush()


@pytest.mark.parametrize("window", [27, 28, 31])
def test_long_windows(tmp_path, window):
    """A frame that does not say its size, so that the decoder needs the window that its head names."""
    texts = [os.urandom(300).hex() for _ in range(200)]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(_long_window(lines(*({"text": text} for text in texts)), window) + _zstd(lines({"text": "last"})))
    assert [document.text for document in read(path)] == [*texts, "last"]


def test_what_is_lost_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 16)
    content = b"".join(lines({"text": os.urandom(1000).hex()}) + b"\n" for _ in range(2000))
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(_zstd(content)[:1_000_000])
    items = read(path)
    assert 500 < len(items) < 1500
    assert items[-1].kind == "corrupt file"
    expected = rf":{2 * len(items) - 1}: cannot be decompressed: ends within a frame: cut short; what follows "
    way_out = r"\(0\.\d of its 1\.0 MB\) is lost: fetch the file again, or leave it out of --input"
    assert re.search(expected + way_out, items[-1].message)


def test_a_block_that_stands_for_much_takes_bounded_memory(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(zstandard.ZstdCompressor().compress(bytes(200 << 20)))
    with path.open("rb") as raw:
        reader = ZstdReader(raw)
        sizes = [len(piece) for piece in iter(lambda: reader.read(1 << 20), b"")]
    assert sum(sizes) == 200 << 20
    assert max(sizes) < 70 << 20


def test_zstandard_that_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(_zstd(b"{}"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match="reading .zst takes the package zstandard: pip install zstandard"):
        read(tmp_path / "a.jsonl.zst")


@pytest.fixture
def parquet(tmp_path):
    def write(columns, row_group_size=3):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
        return path

    return write


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(parquet, kind):
    texts = [f"text {number} \u20ac" for number in range(8)]
    path = parquet({"id": list(range(8)), "body": pa.array(texts).cast(kind)})
    pieces = list(blocks(path))
    assert len(pieces) == 3
    assert sum(block.size for block in pieces) == path.stat().st_size
    assert read(path, "body") == [Document(text, f"{path}:row {row}") for row, text in enumerate(texts, 1)]


def test_bad_parquet_rows(parquet):
    invalid = pa.array([b"a", b"\xff", b"c", None, b"e"]).cast(pa.binary())
    column = pa.Array.from_buffers(pa.string(), 5, invalid.buffers())
    path = parquet({"text": column}, 2)
    assert read(path) == [
        Document("a", f"{path}:row 1"),
        BadRecord("invalid UTF-8", f"{path}:row 2: field 'text': invalid UTF-8 at byte 1"),
        Document("c", f"{path}:row 3"),
        BadRecord("field is not text", f"{path}:row 4: field 'text' is null, not text"),
        Document("e", f"{path}:row 5"),
    ]


def test_parquet_columns(parquet):
    path = parquet({"body": ["a"] * 5, "id": [1] * 5})
    missing = read(path)
    assert [(bad.kind, bad.records) for bad in missing] == [("missing field", 3), ("missing field", 2)]
    assert missing[1].message == f"{path}:row 4: no field 'text' (it has: body, id); name the text's with --text-field"
    assert [(bad.kind, bad.records) for bad in read(path, "id")] == [("field is not text", 3), ("field is not text", 2)]


def test_damaged_parquet(parquet, tmp_path):
    path = parquet({"text": [f"{number} " + "x" * 100 for number in range(2000)]}, 1000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    (bad,) = read(path)
    assert bad.kind == "corrupt file"
    assert bad.message.startswith(f"{path}: not a whole parquet file: ")
    path.write_bytes(whole[:4] + bytes(len(whole) // 3) + whole[4 + len(whole) // 3 :])
    damaged = [item for item in read(path) if isinstance(item, BadRecord)]
    assert damaged[0].kind == "corrupt file"
    assert damaged[0].message.startswith(f"{path}:row 1: cannot be read: ")


def test_expand_inputs(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.txt", "sub/e.md", "[x].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")

    def names(*patterns):
        return [str(path.relative_to(tmp_path)) for path in expand_inputs([f"{tmp_path}/{p}" for p in patterns])]

    assert names("b.txt", "a.txt") == ["b.txt", "a.txt"]
    assert names("**/*.txt") == ["[x].txt", "a.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt"]
    assert names("[ab].txt", "a.txt", "sub/*") == ["a.txt", "b.txt", "sub/c.txt", "sub/e.md"]
    assert names("[x].txt") == ["[x].txt"]
    with pytest.raises(InputError, match=r"nothing\*: no such file, and no file matches"):
        names("a.txt", "nothing*")
    with pytest.raises(InputError, match=r"/sub: is a folder; name its files, for instance '.*/sub/\*\*/\*.txt'"):
        names("sub")
    with pytest.raises(InputError, match=r"sub/dee\*: no such file"):
        names("sub/dee*")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: not a regular file"):
        names("pipe")
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        names("x" * 5000)
    with pytest.raises(InputError, match="~nobody-at-all/x: cannot be read"):
        expand_inputs(["~nobody-at-all/x"])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.txt.gz"])
def test_unreadable_file(tmp_path, name, monkeypatch):
    (tmp_path / name).write_text("{}")

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_vanished_file(tmp_path, name):
    with pytest.raises(InputError, match=f"{name}: cannot be read: No such file"):
        read(tmp_path / name)
