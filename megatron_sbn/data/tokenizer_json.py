"""tokenizer.json of Hugging Face's `tokenizers`: text to token ids with the tokenizer of a model that exists.

The file is used as it is, but for three things that are meant for prompts and not for pretraining: no special tokens
are put around a text, nothing is truncated or padded, and the name of a special token within a text (<|endoftext|>) is
encoded as the text that it is. `tokenizers` is an optional package: pip install 'megatron-sbn[tokenizers]'.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sbn.errors import InputError

END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # looked for in this order
_LIBRARY_ERROR = Exception  # the library raises nothing narrower


class JsonTokenizer:
    """A tokenizer.json. `vocab_size` is its largest id + 1, `eod` the id that ends every document.

    `unknown` is the id of what it cannot write, -1 where there is none. `eod` names the token that ends documents; None
    looks for a usual one. Raises InputError for a file that is missing or none, a token that it does not have, and
    where `tokenizers` is not installed.
    """

    def __init__(self, path: str | Path, eod: str | None = None) -> None:
        self.path = Path(path)
        try:
            content = self.path.read_bytes().decode()
            values = json.loads(content)
        except OSError as error:
            raise InputError(f"{path}: cannot read the tokenizer: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not a tokenizer.json: {error}") from error
        if not (isinstance(values, dict) and isinstance(values.get("model"), dict)):
            raise InputError(f"{path}: not a tokenizer.json: it has no model; give one that `tokenizers` has saved")
        self._tokenizer = _loaded(self.path, content)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eod = _end_of_document(self.path, vocabulary, eod)
        self.unknown = _unknown(values["model"], vocabulary)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-document token."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_array(self, text: str) -> np.ndarray:
        """Token ids of `text` as int32 [tokens]."""
        return np.array(self.encode(text), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included. Raises ValueError for an id outside 0 <= id < vocab_size."""
        tokens = [int(token) for token in ids]
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size} ({self.path})")
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))


def _loaded(path: Path, content: str) -> Any:  # noqa: ANN401 - a type of an optional package
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise InputError(f"{path}: reading a tokenizer.json takes `tokenizers`: pip install tokenizers") from None
    try:
        made = tokenizers.Tokenizer.from_str(content)
    except _LIBRARY_ERROR as error:
        raise InputError(
            f"{path}: not a tokenizer.json that tokenizers {tokenizers.__version__} reads: {error}"
        ) from None
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = True
    return made


def _end_of_document(path: Path, vocabulary: dict[str, int], name: str | None) -> int:
    names = END_OF_DOCUMENT if name is None else (name,)
    found = next((vocabulary[token] for token in names if token in vocabulary), None)
    if found is None:
        raise InputError(f"{path}: has no token {' or '.join(names)} to end documents with; name one with --eod TOKEN")
    return found


def _unknown(model: dict[str, Any], vocabulary: dict[str, int]) -> int:
    """Unigram has the id, the other models the token."""
    number = model.get("unk_id")
    token = model.get("unk_token")
    return number if isinstance(number, int) else vocabulary.get(token, -1) if isinstance(token, str) else -1
