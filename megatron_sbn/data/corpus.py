"""`sbn prepare`: text files to a tokenizer, token shards and a manifest.

    inputs -> documents -> tokens + eod -> PREFIX-train.bin/.idx, PREFIX-validation.bin/.idx   (PREFIX.bin/.idx unsplit)
              PREFIX.model (if trained here), PREFIX.json (the manifest, last)

The output is a function of the inputs and options: neither the number of workers nor the time of day shows in it. Files
get their names when all of them are whole, the manifest when all of them have their names; so a manifest that agrees
with the options means that there is nothing left to do (`is_prepared`, which imports neither torch nor Megatron).
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_sbn.atomic_files import exclusive, partial_path, staged, write_atomically
from megatron_sbn.data.encoding import Encoded, EncodingJob, encode_files, is_held_out
from megatron_sbn.data.progress import Progress
from megatron_sbn.data.readers import BadRecord, Document, blocks, documents, expand_inputs
from megatron_sbn.data.round_trip import SAMPLE_DOCUMENTS, RoundTrip, try_round_trip
from megatron_sbn.data.tokenizer import TextTokenizer, Tokenizer, load_tokenizer, train_model
from megatron_sbn.data.unigram import unigram_loss
from megatron_sbn.errors import InputError

if TYPE_CHECKING:
    from megatron_sbn.data.shards import ShardWriter

_FORMAT = 1
_EXAMPLES = 3
EMPTY = "empty document"


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """What `prepare` makes of what. One of `tokenizer` (a model file) and `vocab_size` (train one) is given.

    `inputs` are files and globs, `output` a path without suffix, `validation_fraction` the share of documents held out
    (0: no split). With `skip_bad`, records that cannot be read are counted, not an error. `eod` names the token that
    ends documents (None: the tokenizer's own). Raises InputError.
    """

    inputs: tuple[str, ...]
    output: Path
    tokenizer: Path | None = None
    vocab_size: int | None = None
    text_field: str = "text"
    validation_fraction: float = 0.0
    skip_bad: bool = False
    seed: int = 0
    eod: str | None = None

    def __post_init__(self) -> None:
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise InputError("give either a tokenizer model (--tokenizer) or the size of one to train (--vocab-size)")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise InputError(f"vocab_size {self.vocab_size} must be positive")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"validation_fraction {self.validation_fraction} must be at least 0 and below 1")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed {self.seed} must be at least 0 and below 2**64")
        if not self.inputs:
            raise InputError("no input: name files or globs")

    @property
    def manifest(self) -> Path:
        """PREFIX.json."""
        return Path(f"{self.output}.json")

    @property
    def model(self) -> Path:
        """The tokenizer's file: the one given, or PREFIX.model."""
        return Path(f"{self.output}.model") if self.tokenizer is None else Path(self.tokenizer)

    @property
    def shards(self) -> dict[str, str]:
        """Prefixes of the shards by split: train and validation, or train alone, which is PREFIX itself."""
        if self.validation_fraction == 0:
            return {"train": str(self.output)}
        return {split: f"{self.output}-{split}" for split in ("train", "validation")}


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """What came out. `skipped` counts records by kind, `splits` is {split: (documents, tokens)}.

    `lost` has a line for each file of which the rest cannot be read. `unknown` counts unknown tokens; `round_trip` is
    what a tokenizer that was given makes of a sample of the documents. `text_bytes` and `split_bytes` are of UTF-8.
    `unigram_loss` is the baseline of the validation split, nats/token (`unigram.py`); None without one.
    """

    documents: int
    tokens: int
    text_bytes: int
    vocab_size: int
    unknown: int
    skipped: Mapping[str, int]
    examples: tuple[str, ...]
    lost: tuple[str, ...]
    splits: Mapping[str, tuple[int, int]]
    split_bytes: Mapping[str, int]
    unigram_loss: float | None = None
    round_trip: RoundTrip | None = None
    paths: tuple[Path, ...] = ()


@dataclasses.dataclass
class _Tally:
    """What is counted while documents are tokenized; `split_bytes` and `counts` (of each token) by split."""

    split_bytes: dict[str, int]
    counts: dict[str, np.ndarray]  # int64 [vocab_size]
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: list[str] = dataclasses.field(default_factory=list)
    unknown: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)

    def add(self, encoded: Encoded) -> None:
        self.skipped.update({EMPTY: encoded.empty} if encoded.empty else {})
        for record in encoded.bad:
            self.skipped[record.kind] += record.records
        self.lost += [record.message for record in encoded.bad if record.kind == "corrupt file"]
        self.examples += [record.message for record in encoded.bad[: _EXAMPLES - len(self.examples)]]
        self.unknown += encoded.unknown
        for split in self.counts:
            own = encoded.held_out == (split == "validation")
            self.split_bytes[split] += int(encoded.text_bytes[own].sum())
            tokens = encoded.tokens[np.repeat(own, encoded.lengths)]
            self.counts[split] += np.bincount(tokens, minlength=len(self.counts[split]))


def is_prepared(options: PrepareOptions) -> bool:
    """Whether `prepare(options)` would write what is there already: a manifest of the same settings and whole files.

    Settings are the options and the names, sizes and times of change of the input files. Raises InputError for inputs
    that are not there.
    """
    try:
        manifest = json.loads(options.manifest.read_text(encoding="utf-8"))
        sizes = {name: (options.manifest.parent / name).stat().st_size for name in manifest["files"]}
        return bool(
            manifest["format"] == _FORMAT
            and manifest["settings"] == _settings(options, expand_inputs(options.inputs))
            and manifest["files"] == sizes
            and manifest["tokenizer_sha256"] == _sha256(options.model)
            and not _lost_spaces(options, manifest)
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # no manifest, or none of ours
        return False


def _lost_spaces(options: PrepareOptions, manifest: Mapping[str, Any]) -> bool:
    """Whether spaces are U+2581 in the shards: an earlier release made them, with a model that has no piece for one."""
    if options.tokenizer is not None or "round_trip" in manifest:
        return False
    return Tokenizer(options.model).writes_spaces_as_bytes


def prepare(options: PrepareOptions, *, workers: int = 1) -> PrepareReport:
    """Tokenize `options.inputs` with `workers` processes and write everything under `options.output`.

    Raises InputError for bad input with its file and line, an empty corpus or split, a tokenizer that cannot be had,
    and an output that cannot be written; what was under the final names before is then as it was.
    """
    if workers < 1:
        raise InputError(f"workers {workers} must be at least 1")
    files = expand_inputs(options.inputs)
    settings = _settings(options, files)
    bins = [Path(f"{prefix}.bin") for prefix in options.shards.values()]
    indices = [Path(f"{prefix}.idx") for prefix in options.shards.values()]
    models = [options.model] if options.tokenizer is None else []
    with exclusive(options.output):
        with staged([*models, *bins, *indices], obsolete=[options.manifest, *indices]):
            for model in models:
                texts = _training_texts(options, files)
                content = train_model(texts, options.vocab_size or 0, seed=options.seed, spoken=True)
                partial_path(model).write_bytes(content)
            tokenizer = load_tokenizer(partial_path(options.model) if models else options.model, options.eod)
            job = EncodingJob(
                str(tokenizer.path),
                _sha256(tokenizer.path),
                options.text_field,
                options.validation_fraction,
                options.seed,
                options.eod,
            )
            trip = None if models else try_round_trip(tokenizer, _sampled_texts(options, files))
            report = _write_shards(options, files, job, tokenizer, workers)
            report = dataclasses.replace(report, round_trip=trip, paths=(*models, *bins, *indices, options.manifest))
        manifest = _manifest(options, settings, report, job.digest, tokenizer)
        write_atomically(options.manifest, json.dumps(manifest, indent=1).encode() + b"\n")
    return report


def _write_shards(
    options: PrepareOptions, files: list[Path], job: EncodingJob, tokenizer: TextTokenizer, workers: int
) -> PrepareReport:
    """Write the partial files of all shards; InputError if one of them would be empty."""
    tally = _Tally(
        dict.fromkeys(options.shards, 0),
        {split: np.zeros(tokenizer.vocab_size, dtype=np.int64) for split in options.shards},
    )
    total = sum(path.stat().st_size for path in files)
    with _writers(options, tokenizer.vocab_size) as writers, Progress(total, "tokenizing") as progress:
        for encoded in encode_files(files, job, workers):
            if encoded.bad and not options.skip_bad:
                raise InputError(_stop(encoded.bad[0]))
            tally.add(encoded)
            _append(writers, encoded)
            splits = {split: (writer.documents, writer.tokens) for split, writer in writers.items()}
            counts = [sum(column) for column in zip(*splits.values(), strict=True)]
            progress.advance(encoded.size, f"{counts[0]} documents, {counts[1]} tokens")
        splits = {split: (writer.documents, writer.tokens) for split, writer in writers.items()}
        _refuse_empty(options, splits, len(files), tally.skipped)
        for writer in writers.values():
            writer.finish()
    all_documents, tokens = (sum(column) for column in zip(*splits.values(), strict=True))
    counted = (tokenizer.vocab_size, tally.unknown, dict(tally.skipped), tuple(tally.examples), tuple(tally.lost))
    baseline = None if len(splits) == 1 else unigram_loss(tally.counts["train"], tally.counts["validation"])
    return PrepareReport(
        *(all_documents, tokens, sum(tally.split_bytes.values()), *counted, splits),
        split_bytes=tally.split_bytes,
        unigram_loss=baseline,
    )


@contextlib.contextmanager
def _writers(options: PrepareOptions, vocab_size: int) -> Iterator[dict[str, "ShardWriter"]]:
    """A writer for each split, into partial files; closed on the way out."""
    from megatron_sbn.data.shards import ShardWriter  # Megatron-Core's import takes seconds, and is_prepared needs none

    writers: dict[str, ShardWriter] = {}
    try:
        for split, prefix in options.shards.items():
            names = [partial_path(Path(f"{prefix}.{suffix}")) for suffix in ("bin", "idx")]
            writers[split] = ShardWriter(names[0], names[1], vocab_size)
        yield writers
    finally:
        for writer in writers.values():
            writer.abandon()


def _append(writers: Mapping[str, "ShardWriter"], encoded: Encoded) -> None:
    """Every document to its split, in order."""
    end = 0
    for length, held_out in zip(encoded.lengths.tolist(), encoded.held_out.tolist(), strict=True):
        writers["validation" if held_out else "train"].add(encoded.tokens[end : end + length])
        end += length


def _refuse_empty(
    options: PrepareOptions, splits: Mapping[str, tuple[int, int]], files: int, skipped: Mapping[str, int]
) -> None:
    found = sum(count for count, _ in splits.values())
    if found == 0:
        left_out = ", ".join(f"{count} x {kind}" for kind, count in skipped.items())
        raise InputError(f"empty corpus: no text in {files} files{f' (left out: {left_out})' if left_out else ''}")
    for split, (count, _) in splits.items():
        if count == 0:
            raise InputError(
                f"validation_fraction {options.validation_fraction} leaves no {split} document of {found}; "
                "give more documents, another fraction or another seed"
            )


def _training_texts(options: PrepareOptions, files: list[Path]) -> Iterator[str]:
    """What the tokenizer may learn from: the documents that are not held out."""
    with Progress(sum(path.stat().st_size for path in files), "reading for the tokenizer") as progress:
        for path in files:
            for block in blocks(path):
                for item in documents(block, options.text_field):
                    if isinstance(item, BadRecord):
                        if not options.skip_bad:
                            raise InputError(_stop(item))
                    elif not is_held_out(item.text, options.validation_fraction, options.seed):
                        yield item.text
                progress.advance(block.size, path.name)


def _sampled_texts(options: PrepareOptions, files: list[Path]) -> Iterator[str]:
    """At most SAMPLE_DOCUMENTS documents: the first of every file, or of files at even distances."""
    chosen = [files[number * len(files) // SAMPLE_DOCUMENTS] for number in range(SAMPLE_DOCUMENTS)]
    for path, share in Counter(chosen).items():
        items = (item for block in blocks(path) for item in documents(block, options.text_field))
        texts = (item.text for item in items if isinstance(item, Document) and item.text)
        yield from itertools.islice(texts, share)


def _stop(record: BadRecord) -> str:
    if record.kind == "corrupt file":
        return f"{record.message} [--skip-bad goes on without the rest of such a file, and names it]"
    return f"{record.message} [--skip-bad leaves such records out and counts them]"


def _settings(options: PrepareOptions, files: list[Path]) -> dict[str, Any]:
    """All that the output depends on, as JSON keeps it."""
    listing = hashlib.sha256()
    for path in files:
        status = path.stat()
        listing.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    settings = dataclasses.asdict(options) | {"inputs_sha256": listing.hexdigest(), "files": len(files)}
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in settings.items()
        if key not in ("inputs", "output") and not (key == "eod" and value is None)  # not there in earlier releases
    }


def _manifest(
    options: PrepareOptions, settings: dict[str, Any], report: PrepareReport, digest: str, tokenizer: TextTokenizer
) -> dict[str, Any]:
    written = [Path(f"{prefix}.{suffix}") for prefix in options.shards.values() for suffix in ("bin", "idx")]
    return {
        "format": _FORMAT,
        "settings": settings,
        "tokenizer": str(options.model),
        "tokenizer_sha256": digest,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "documents": report.documents,
        "tokens": report.tokens,
        "text_bytes": report.text_bytes,
        "skipped": report.skipped,
        "lost": report.lost,
        "unknown_tokens": report.unknown,
        "round_trip": None if report.round_trip is None else report.round_trip.as_json(),
        "splits": {split: _split_entry(split, prefix, report) for split, prefix in options.shards.items()},
        "files": {path.name: path.stat().st_size for path in written},
    }


def _split_entry(split: str, prefix: str, report: PrepareReport) -> dict[str, Any]:
    documents, tokens = report.splits[split]
    entry = {"prefix": prefix, "documents": documents, "tokens": tokens, "text_bytes": report.split_bytes[split]}
    return entry | ({"unigram_loss": report.unigram_loss} if split == "validation" else {})


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
