"""What a tokenizer loses: documents are encoded, decoded, and compared.

A tokenizer from elsewhere may have no token for a character (it becomes the unknown token), or may normalize: newlines
and tabs become spaces, runs of spaces one space. What is lost that way no model can learn.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

from megatron_sbn.data.tokenizer import TextTokenizer

SAMPLE_DOCUMENTS = 1000
_LONGEST = 1 << 20  # characters of a document that are tried
_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class RoundTrip:
    """Documents that were tried. A character is lost if what comes back has fewer of it than the document.

    Attributes:
        documents, changed: documents that were tried, and those of them that do not come back as they were.
        characters, lost: characters of all of them, and those that do not come back.
        example: the first difference, as `'before' -> 'after'`; empty without one.
    """

    documents: int = 0
    changed: int = 0
    characters: int = 0
    lost: int = 0
    example: str = ""

    def as_json(self) -> dict[str, Any]:
        """Counts, for the manifest."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "example"}


def try_round_trip(tokenizer: TextTokenizer, texts: Iterable[str]) -> RoundTrip:
    """Encode and decode every text, of each its first 2^20 characters at most."""
    documents = changed = characters = lost = 0
    example = ""
    for document in texts:
        text = document[:_LONGEST]
        back = tokenizer.decode(tokenizer.encode_array(text).tolist())
        documents += 1
        characters += len(text)
        if back != text:
            changed += 1
            lost += (Counter(text) - Counter(back)).total()
            example = example or _difference(text, back)
    return RoundTrip(documents, changed, characters, lost, example)


def what_is_lost(tokenizer: str, trip: RoundTrip | None, unknown: int, tokens: int) -> str:
    """One line about the text that a tokenizer loses; empty if it loses none.

    `unknown` of all `tokens` are the unknown token; `trip` is None where nothing was tried.
    """
    found = []
    if unknown:
        found.append(f"{unknown:,} unknown tokens ({_percent(unknown, tokens)})")
    if trip is not None and trip.changed:
        found.append(
            f"{trip.changed:,} of {trip.documents:,} documents tried do not come back as they were "
            f"({_percent(trip.changed, trip.documents)}), {_percent(trip.lost, trip.characters)} of their characters "
            f"are lost, such as {trip.example}"
        )
    if not found:
        return ""
    return f"{tokenizer}: loses text: {'; '.join(found)}; --vocab-size in place of --tokenizer trains one that does not"


def _percent(part: int, whole: int) -> str:
    percent = 100 * part / max(1, whole)
    return f"{percent:.1f}%" if percent >= 1 else f"{percent:.2g}%"


def _difference(text: str, back: str) -> str:
    """Where two texts first differ, with what follows."""
    same = next((n for n, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    return f"{text[same : same + _SHOWN]!a} -> {back[same : same + _SHOWN]!a}"
