"""Text to token ids and back, exactly: sentencepiece BPE with byte fallback.

Models trained here lose nothing: `decode(encode(text)) == text` for every string that UTF-8 can hold. No Unicode
normalization, no added or removed spaces, runs of spaces may become one piece (source code is full of them), every
digit is its own piece, and a character outside the vocabulary becomes its UTF-8 bytes. Two things need care:

- sentencepiece writes a space as U+2581 and so cannot tell it from a real U+2581; that one is given as its three bytes.
  A model that was trained on text (almost) without spaces has no piece for a space: it is given as its byte.
- a text is encoded in segments of at most 1 Mi characters, cut behind a line end where there is one, which bounds the
  memory that sentencepiece needs.

A model from elsewhere that normalizes, or puts a space in front of the text, is used as it is, on the whole text.
"""

import contextlib
import heapq
import io
import itertools
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from megatron_sbn.atomic_files import write_atomically
from megatron_sbn.data.progress import elapsed
from megatron_sbn.errors import InputError

SAMPLE_CHARACTERS = 100_000_000  # what training a tokenizer looks at, at most: about 2 GB of memory
_SEGMENT = 1 << 20
_CHUNK = 8192  # characters given to the trainer at once; its word positions are 16 bits
_SPACE = "\u2581"
_UNKNOWN = "\u2585"  # the trainer's own mark of a character outside its alphabet
_LOG_FATAL = 3
_THREADS = 1  # of training: the model file records it, and BPE gains nothing by more


class TextTokenizer(Protocol):
    """What `sbn prepare` needs of a tokenizer, whoever made it; ids are 0 <= id < `vocab_size`."""

    path: Path
    vocab_size: int
    eod: int
    unknown: int

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text` as int32 [tokens], without an end-of-document token."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids."""


def load_tokenizer(path: str | Path, eod: str | None = None) -> TextTokenizer:
    """A tokenizer by its file: `.json` is Hugging Face's, anything else a sentencepiece model.

    `eod` names the token that ends documents; None takes the model's own, or a usual one. Raises InputError.
    """
    if Path(path).name.endswith(".json"):
        from megatron_sbn.data.tokenizer_json import JsonTokenizer

        return JsonTokenizer(path, eod)
    return Tokenizer(path, eod)


class Tokenizer:
    """A sentencepiece model. `vocab_size` pieces, `eod` ends every document: the eos, or the piece that is named.

    `unknown` is the id of what the model cannot write, -1 where there is none.

    Raises InputError for a model file that is missing, is no sentencepiece model, or has no end-of-sentence piece.
    """

    def __init__(self, path: str | Path, eod: str | None = None) -> None:
        self.path = Path(path)
        sentencepiece.set_min_log_level(_LOG_FATAL)
        try:
            if self.path.exists() and not (self.path.is_file() or self.path.is_dir()):
                raise InputError(f"{path}: is no file; name a tokenizer model")
            content = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot read the tokenizer model: {error.strerror}") from error
        except ValueError as error:  # a path that no system has
            raise InputError(f"{path}: cannot read the tokenizer model: {error}") from error
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: not a sentencepiece model; give one made by `sbn prepare --vocab-size`"
            ) from error
        self.vocab_size: int = self._model.vocab_size()
        self.unknown: int = self._model.unk_id()
        self.eod: int = self._model.eos_id()
        if eod is not None:
            self.eod = self._model.piece_to_id(eod)
            if self.eod == self.unknown:
                raise InputError(f"{path}: has no piece {eod} to end documents with; name one of its own with --eod")
        if self.eod < 0:
            raise InputError(
                f"{path}: the tokenizer has no end-of-sentence piece to end documents with; use one that has, "
                "or name another piece with --eod"
            )
        self._in_bytes = self._given_in_bytes()

    @property
    def writes_spaces_as_bytes(self) -> bool:
        """Whether a space is its byte, because the model has no piece for it."""
        return " " in self._in_bytes

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-document token. Raises ValueError for a lone surrogate."""
        return [token for part in self._encode_parts(text) for token in part]

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text` as int32 [tokens]: the same ids in less memory."""
        parts = [np.array(part, dtype=np.int32) for part in self._encode_parts(text)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 (a cut character) become U+FFFD.

        Raises ValueError for an id outside 0 <= id < vocab_size.
        """
        tokens = [int(token) for token in ids]
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size} ({self.path})")
        return str(self._model.decode(tokens))

    def _given_in_bytes(self) -> dict[str, list[int]]:
        """What sentencepiece takes for other characters, and its bytes' ids; none for a model that normalizes."""
        fallback = {
            character: [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
            for character in (_SPACE, " ")
        }
        in_bytes = all(self._model.is_byte(token) for ids in fallback.values() for token in ids)
        if not in_bytes or _SPACE in "".join(self._model.encode("a", out_type=str)):
            return {}
        if self._model.piece_to_id(_SPACE) != self._model.unk_id():
            del fallback[" "]
        return fallback

    def _encode_parts(self, text: str) -> Iterator[list[int]]:
        if not self._in_bytes:
            yield self._model.encode(text)
            return
        apart = re.compile(f"([{''.join(self._in_bytes)}])")
        for segment in _segments(text):
            for piece in apart.split(segment):
                yield self._in_bytes.get(piece) or self._model.encode(piece)


def _segments(text: str) -> Iterator[str]:
    """`text` in order, in parts of at most _SEGMENT characters that end with a line where possible."""
    start = 0
    while start < len(text):
        end = start + _SEGMENT
        if end < len(text):
            line_end = text.rfind("\n", start, end)
            end = line_end + 1 if line_end >= 0 else end
        yield text[start:end]
        start = end


def train_tokenizer(documents: Iterable[str], output: str | Path, vocab_size: int, *, seed: int = 0) -> Tokenizer:
    """Train a tokenizer on `documents` and write its model to `output`, whole or not at all.

    Raises what `train_model` does, and InputError where the file cannot be written.
    """
    write_atomically(Path(output), train_model(documents, vocab_size, seed=seed))
    return Tokenizer(output)


def train_model(documents: Iterable[str], vocab_size: int, *, seed: int = 0, spoken: bool = False) -> bytes:
    """A serialized sentencepiece BPE model of exactly `vocab_size` pieces, a function of the input and seed.

    Pieces 0 to 2 are unk, bos and eos, the next 256 are the bytes. At most SAMPLE_CHARACTERS characters are looked at:
    a uniform sample of the documents, by `seed`, where there are more. Raises InputError when there is no text, or when
    `vocab_size` does not fit it, with the limit that does. Where it is `spoken`, stderr is told how long it takes.
    """
    model = io.BytesIO()
    sample = _sample(documents, SAMPLE_CHARACTERS, seed)
    size = sum(len(text.encode()) for text in sample) / 1e6 if spoken else 0.0
    label = f"training a tokenizer of {vocab_size:,} pieces on {size:,.1f} MB with {_THREADS} thread"
    chunks = _chunks(sample)
    first = next(chunks, None)
    if first is None:
        raise InputError("empty corpus: there is no text to train a tokenizer on")
    try:
        with elapsed(label) if spoken else contextlib.nullcontext():
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=itertools.chain([first], chunks),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                split_digits=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=8 * _CHUNK,
                num_threads=_THREADS,
                minloglevel=_LOG_FATAL,
            )
    except RuntimeError as error:
        raise InputError(_size_advice(vocab_size, str(error))) from error
    return model.getvalue()


def _size_advice(vocab_size: int, message: str) -> str:
    """One line out of sentencepiece's message, with the limit that it names."""
    most = re.search(r"set it to a value <= (\d+)", message)
    if most:
        return f"vocab_size {vocab_size} is too large for this corpus: at most {most[1]}, or give more text"
    least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if least:
        return f"vocab_size {vocab_size} is too small for the characters of this corpus: at least {least[1]}"
    return f"sentencepiece cannot train vocab_size {vocab_size} on this corpus: {' '.join(message.split())}"


def _sample(documents: Iterable[str], limit: int, seed: int) -> list[str]:
    """All documents, or those with the smallest random keys that fit into `limit` characters, in their order.

    Memory is bounded by `limit` and one document; a longer document counts with its first `limit` characters.
    """
    keys = random.Random(seed)
    heap: list[tuple[float, int, str]] = []
    characters = 0
    for number, document in enumerate(documents):
        heapq.heappush(heap, (-keys.random(), number, document[:limit]))
        characters += min(len(document), limit)
        while characters > limit and len(heap) > 1:
            characters -= len(heapq.heappop(heap)[2])
    return [document for _, _, document in sorted(heap, key=lambda entry: entry[1])]


def _chunks(documents: Iterable[str]) -> Iterator[str]:
    """What the trainer is given: no NUL, no U+2585 (it leaves such text out), no U+2581 (a space), bounded length."""
    for document in documents:
        text = document.replace("\0", "").replace(_SPACE, "").replace(_UNKNOWN, "")
        for start in range(0, len(text), _CHUNK):
            yield text[start : start + _CHUNK]
