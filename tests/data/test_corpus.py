"""`prepare` end to end: the tokens are those of the text, whoever computes them; a failure leaves nothing behind."""

import dataclasses
import gzip
import hashlib
import json
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from time_limit import LIMIT_SECONDS

from megatron_sbn.atomic_files import exclusive, partial_path
from megatron_sbn.data.corpus import PrepareOptions, is_prepared, prepare
from megatron_sbn.data.encoding import is_held_out
from megatron_sbn.data.tokenizer import Tokenizer, train_model
from megatron_sbn.errors import InputError, SbnError


@pytest.fixture
def inputs(tmp_path, documents):
    """The fifty documents over five formats, an empty document, and a blank line: globs in order."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(documents[number], newline="")
    (folder / "empty.txt").touch()
    lines = [json.dumps({"text": text}) for text in documents[10:40]]
    (folder / "a.jsonl").write_text("\n".join(lines[:20]) + "\n\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[20:]).encode()))
    pq.write_table(pa.table({"text": documents[40:]}), folder / "c.parquet", row_group_size=4)
    return tuple(f"{folder}/{pattern}" for pattern in ("*.txt", "a.jsonl", "b.jsonl.gz", "*.parquet"))


def _tokens(prefix):
    reader = IndexedDataset(str(prefix))
    assert reader.document_indices.tolist() == list(range(len(reader) + 1))
    return [reader[number].tolist() for number in range(len(reader))]


def _files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_tokens_of_every_format(inputs, tmp_path, documents, tokenizer):
    options = PrepareOptions(inputs, tmp_path / "out" / "corpus", tokenizer=tokenizer.path)
    report = prepare(options)
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in documents]
    assert _tokens(tmp_path / "out" / "corpus") == expected
    assert report.documents == 50
    assert report.tokens == sum(map(len, expected))
    assert report.text_bytes == sum(len(text.encode()) for text in documents)
    assert report.skipped == {"empty document": 1}
    assert report.splits == {"train": (50, report.tokens)}
    assert {path.name for path in report.paths} == {"corpus.bin", "corpus.idx", "corpus.json"}
    assert set(_files(tmp_path / "out")) == {"corpus.bin", "corpus.idx", "corpus.json"}


def test_split_is_by_document_and_content(inputs, tmp_path, documents, tokenizer):
    options = PrepareOptions(inputs, tmp_path / "o" / "c.v1", tokenizer=tokenizer.path, validation_fraction=0.2, seed=7)
    report = prepare(options)
    train, held_out = _tokens(tmp_path / "o" / "c.v1-train"), _tokens(tmp_path / "o" / "c.v1-validation")
    for side, tokens in ((False, train), (True, held_out)):
        texts = [text for text in documents if is_held_out(text, 0.2, 7) == side]
        assert tokens == [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    assert 3 <= len(held_out) <= 18
    assert report.splits["validation"] == (len(held_out), sum(map(len, held_out)))
    assert report.splits["train"] == (len(train), sum(map(len, train)))
    assert not (tmp_path / "o" / "c.v1.bin").exists()
    backwards = dataclasses.replace(options, inputs=inputs[::-1], output=tmp_path / "back")
    prepare(backwards)
    assert sorted(_tokens(tmp_path / "back-validation")) == sorted(held_out)


def test_workers_do_not_show(inputs, tmp_path):
    options = PrepareOptions(inputs, tmp_path / "one" / "c", vocab_size=330, validation_fraction=0.2)
    reports = [
        prepare(dataclasses.replace(options, output=tmp_path / name / "c"), workers=workers)
        for name, workers in (("one", 1), ("two", 2))
    ]
    first, second = (_files(tmp_path / name) for name in ("one", "two"))
    names = {"c.model", "c-train.bin", "c-train.idx", "c-validation.bin", "c-validation.idx", "c.json"}
    assert set(first) == set(second) == names
    for name in names - {"c.json"}:
        assert first[name] == second[name]
    assert dataclasses.replace(reports[0], paths=()) == dataclasses.replace(reports[1], paths=())


def test_trained_tokenizer_sees_training_documents_only(inputs, tmp_path, documents):
    report = prepare(PrepareOptions(inputs, tmp_path / "c", vocab_size=330, validation_fraction=0.2))
    kept = [text for text in documents if not is_held_out(text, 0.2, 0)]
    assert (tmp_path / "c.model").read_bytes() == train_model(kept, 330)
    assert report.vocab_size == Tokenizer(tmp_path / "c.model").vocab_size == 330
    assert Tokenizer(tmp_path / "c.model").decode(_tokens(tmp_path / "c-train")[0][:-1]) == kept[0]


def test_manifest_and_is_prepared(inputs, tmp_path, tokenizer):
    options = PrepareOptions(inputs, tmp_path / "o" / "c", tokenizer=tokenizer.path, validation_fraction=0.2)
    assert not is_prepared(options)
    report = prepare(options)
    manifest = json.loads((tmp_path / "o" / "c.json").read_text())
    assert manifest["tokenizer"] == str(tokenizer.path)
    assert manifest["tokenizer_sha256"] == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    assert (manifest["vocab_size"], manifest["eod"]) == (340, 2)
    assert (manifest["documents"], manifest["tokens"]) == (report.documents, report.tokens)
    assert sum(split["tokens"] for split in manifest["splits"].values()) == report.tokens
    assert is_prepared(options)
    for change in ({"seed": 1}, {"validation_fraction": 0.3}, {"text_field": "body"}, {"inputs": inputs[:2]}):
        assert not is_prepared(dataclasses.replace(options, **change))
    assert not is_prepared(dataclasses.replace(options, tokenizer=None, vocab_size=330))
    Path(inputs[1]).write_text(json.dumps({"text": "other"}))
    assert not is_prepared(options)
    prepare(options)
    assert is_prepared(options)


@pytest.mark.parametrize("suffix", ["-train.bin", "-train.idx", "-validation.bin", ".json"])
def test_is_prepared_looks_at_the_files(inputs, tmp_path, tokenizer, suffix):
    options = PrepareOptions(inputs, tmp_path / "c", tokenizer=tokenizer.path, validation_fraction=0.2)
    prepare(options)
    path = Path(f"{options.output}{suffix}")
    path.write_bytes(path.read_bytes()[:-2])
    assert not is_prepared(options)
    path.unlink()
    assert not is_prepared(options)


def test_is_prepared_is_cheap(inputs, tmp_path, tokenizer):
    options = PrepareOptions(inputs, tmp_path / "c", tokenizer=tokenizer.path)
    prepare(options)
    script = (
        "import sys; from pathlib import *; from megatron_sbn.data.corpus import *\n"
        f"assert is_prepared({options!r})\n"
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


BAD = {
    "bad.txt": (b"fine\n\xff", "invalid UTF-8", 1, r"bad.txt:2: invalid UTF-8"),
    "bad.jsonl": (b'{"text": "fine"}\n{"text":\n{"text": "fine"}\n', "invalid JSON", 1, r"bad.jsonl:2: not a JSON"),
    "field.jsonl": (
        b'{"text": "fine"}\n\n{"body": 1}\n{"id": 2}',
        "missing field",
        2,
        r"field.jsonl:3: no field 'text'",
    ),
    "null.jsonl": (b'{"text": null}\n', "field is not text", 1, r"null.jsonl:1: field 'text' is null"),
    "bad.parquet": (b"PAR1 no parquet", "corrupt file", 1, r"bad.parquet: not a whole parquet file"),
    "bad.jsonl.gz": (b"no gzip", "corrupt file", 1, r"bad.jsonl.gz:1: cannot be decompressed"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("source", ["tokenizer", "vocab_size"])
def test_bad_input_stops_with_its_place(inputs, tmp_path, tokenizer, name, source):
    content, _, _, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    chosen = {"tokenizer": tokenizer.path} if source == "tokenizer" else {"vocab_size": 330}
    options = PrepareOptions((*inputs, str(tmp_path / name)), tmp_path / "o" / "c", **chosen)
    with pytest.raises(InputError, match=message) as failure:
        prepare(options)
    assert "--skip-bad" in str(failure.value)
    assert "\n" not in str(failure.value)
    assert list((tmp_path / "o").iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_is_skipped_and_counted(inputs, tmp_path, tokenizer, documents, workers):
    for name, (content, *_) in BAD.items():
        (tmp_path / name).write_bytes(content)
    paths = tuple(str(tmp_path / name) for name in BAD)
    options = PrepareOptions((*paths, *inputs), tmp_path / "o" / "c", tokenizer=tokenizer.path, skip_bad=True)
    report = prepare(options, workers=workers)
    expected = Counter({"empty document": 1})
    for _, kind, count, _ in BAD.values():
        expected[kind] += count
    assert report.skipped == expected
    assert [line.split(": ")[0] for line in report.lost] == [
        str(tmp_path / "bad.parquet"),
        f"{tmp_path}/bad.jsonl.gz:1",
    ]
    assert len(report.examples) == 3
    assert "bad.txt:2: invalid UTF-8" in report.examples[0]
    fine = [*tokenizer.encode("fine"), tokenizer.eod]
    assert _tokens(tmp_path / "o" / "c") == [
        fine,
        fine,
        fine,
        *([*tokenizer.encode(text), tokenizer.eod] for text in documents),
    ]


def test_first_bad_record_is_reported_whoever_finds_it(tmp_path, tokenizer):
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_bytes(b"text" if number < 9 else b"\xff")
    with pytest.raises(InputError, match=r"/09.txt:1: invalid UTF-8"):
        prepare(PrepareOptions((f"{tmp_path}/*.txt",), tmp_path / "o" / "c", tokenizer=tokenizer.path), workers=2)


@pytest.mark.parametrize("source", ["tokenizer", "vocab_size"])
def test_empty_corpus(tmp_path, tokenizer, source):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").write_text('\n{"text": ""}\n')
    (tmp_path / "c.txt").write_bytes(b"\xff")
    chosen = {"tokenizer": tokenizer.path} if source == "tokenizer" else {"vocab_size": 330}
    with pytest.raises(InputError, match=r"empty corpus"):
        prepare(PrepareOptions((f"{tmp_path}/*.*",), tmp_path / "o" / "c", skip_bad=True, **chosen))
    assert list((tmp_path / "o").iterdir()) == []


def test_empty_corpus_says_what_was_left_out(tmp_path, tokenizer):
    (tmp_path / "a.txt").touch()
    (tmp_path / "c.txt").write_bytes(b"\xff")
    options = PrepareOptions((f"{tmp_path}/*.txt",), tmp_path / "o" / "c", tokenizer=tokenizer.path, skip_bad=True)
    with pytest.raises(InputError, match=r"no text in 2 files \(left out: 1 x empty document, 1 x invalid UTF-8\)"):
        prepare(options)


@pytest.mark.parametrize(("fraction", "side"), [(1e-9, "validation"), (1 - 1e-9, "train")])
def test_empty_split(inputs, tmp_path, tokenizer, fraction, side):
    options = PrepareOptions(inputs, tmp_path / "o" / "c", tokenizer=tokenizer.path, validation_fraction=fraction)
    with pytest.raises(InputError, match=f"leaves no {side} document of 50"):
        prepare(options)
    assert list((tmp_path / "o").iterdir()) == []


def test_large_vocabularies_get_32_bits(inputs, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(Tokenizer, "__init__", _with_vocab_size(100_000))
    prepare(PrepareOptions(inputs, tmp_path / "wide", tokenizer=tokenizer.path))
    monkeypatch.undo()
    prepare(PrepareOptions(inputs, tmp_path / "narrow", tokenizer=tokenizer.path))
    assert IndexedDataset(str(tmp_path / "wide")).index.dtype == np.int32
    assert IndexedDataset(str(tmp_path / "narrow")).index.dtype == np.uint16
    assert _tokens(tmp_path / "wide") == _tokens(tmp_path / "narrow")


def _with_vocab_size(size):
    original = Tokenizer.__init__

    def wide(self, path, eod=None):
        original(self, path, eod)
        self.vocab_size = size

    return wide


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "either a tokenizer model"),
        ({"tokenizer": Path("t.model"), "vocab_size": 300}, "either a tokenizer model"),
        ({"vocab_size": 0}, "vocab_size 0 must be positive"),
        ({"vocab_size": 300, "validation_fraction": 1.0}, "validation_fraction 1.0 must be"),
        ({"vocab_size": 300, "validation_fraction": float("nan")}, "validation_fraction nan must be"),
        ({"vocab_size": 300, "seed": -1}, "seed -1 must be"),
        ({"vocab_size": 300, "inputs": ()}, "no input"),
    ],
)
def test_wrong_options(change, message):
    with pytest.raises(InputError, match=message):
        PrepareOptions(**({"inputs": ("a.txt",), "output": Path("o")} | change))


def test_no_workers(inputs, tmp_path, tokenizer):
    with pytest.raises(InputError, match="workers 0 must be at least 1"):
        prepare(PrepareOptions(inputs, tmp_path / "c", tokenizer=tokenizer.path), workers=0)


def test_output_that_cannot_be_written(inputs, tmp_path, tokenizer):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file: cannot write the output there: (Not a directory|File exists)"):
        prepare(PrepareOptions(inputs, tmp_path / "file" / "c", tokenizer=tokenizer.path))


@pytest.mark.parametrize("limit", [500, 9_000])
def test_full_disk_leaves_nothing(inputs, tmp_path, tokenizer, limit):
    """A limit on the size of files fails a write as a full disk does: at once, or what is buffered at the end."""
    options = PrepareOptions(inputs, tmp_path / "o" / "c", tokenizer=tokenizer.path)
    prepare(options)
    before = _files(tmp_path / "o")
    assert (tmp_path / "o" / "c.bin").stat().st_size > 9_000
    Path(inputs[1]).write_text(json.dumps({"text": "other " * 2000}))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(InputError, match="cannot be written: File too large"):
            prepare(options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert _files(tmp_path / "o") == before


KILLED = """
import sys
from pathlib import Path
from megatron_sbn.data.corpus import PrepareOptions, prepare
if __name__ == "__main__":
    prepare(PrepareOptions((sys.argv[1],), Path(sys.argv[2]), Path(sys.argv[3])), workers=2)
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_the_middle(tmp_path, documents, tokenizer, kind):
    script, source = tmp_path / "run.py", tmp_path / "in.jsonl"
    script.write_text(KILLED)
    with source.open("w") as lines:
        for number in range(400_000):
            lines.write(json.dumps({"text": f"{number} {documents[number % 50]}"}) + "\n")
    output = tmp_path / "o" / "c"
    process = subprocess.Popen([sys.executable, str(script), str(source), str(output), str(tokenizer.path)])
    partial = partial_path(tmp_path / "o" / "c.bin")
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (partial.exists() and partial.stat().st_size > 0):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(InputError, match="another process is writing this output"), exclusive(output):
        pass
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(kind)
    assert process.wait(60) == -kind
    assert len(children) >= 2
    assert psutil.wait_procs(children, timeout=LIMIT_SECONDS)[1] == []  # no worker outlives its parent
    left = set(_files(tmp_path / "o"))
    assert partial.name in left
    assert all(name.startswith(".") for name in left)
    source.write_text(json.dumps({"text": "after"}))
    prepare(PrepareOptions((str(source),), output, tokenizer.path))
    assert set(_files(tmp_path / "o")) == {"c.bin", "c.idx", "c.json"}
    assert _tokens(output) == [[*tokenizer.encode("after"), tokenizer.eod]]


def test_dead_worker_is_reported(inputs, tmp_path, tokenizer):
    options = PrepareOptions(inputs, tmp_path / "o" / "c", tokenizer=tokenizer.path)
    bomb = tmp_path / "bomb.py"
    bomb.write_text(
        "import os, sys\nfrom pathlib import Path\nfrom megatron_sbn.data import encoding, readers\n"
        "from megatron_sbn.data.corpus import PrepareOptions, prepare\nfrom megatron_sbn.errors import SbnError\n"
        "class Bomb:\n    def __reduce__(self):\n        return os._exit, (9,)\n"
        "if __name__ == '__main__':\n"
        "    encoding.blocks = lambda path: iter([readers.Block(str(path), 'text', 1, payload=Bomb())])\n"
        f"    try:\n        prepare(PrepareOptions({options.inputs!r}, Path({str(options.output)!r}), "
        f"Path({str(tokenizer.path)!r})), workers=2)\n"
        "    except SbnError as error:\n        print(error.status, error)\n"
    )
    result = subprocess.run([sys.executable, str(bomb)], capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert result.stdout == "1 a tokenization worker died (out of memory?); try again with fewer --workers\n"
    assert list((tmp_path / "o").iterdir()) == []
    assert SbnError.status == 1


def test_progress_in_a_log(inputs, tmp_path, tokenizer, capfd):
    prepare(PrepareOptions(inputs, tmp_path / "c", tokenizer=tokenizer.path))
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("tokenizing: 100% of 0.0 MB, 50 documents, ")
    assert line.endswith(" tokens")
