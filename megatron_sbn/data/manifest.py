"""What `sbn prepare` wrote down about a shard: PREFIX.json beside PREFIX.bin, or beside PREFIX-train.bin and its twin.

    {"format": 1, "tokenizer": FILE, "tokenizer_sha256": HEX, "vocab_size": N, "eod": ID, "documents": N, "tokens": N,
     "text_bytes": N, "unknown_tokens": N, "round_trip": {...} or null, "skipped": {KIND: N}, "lost": [LINE],
     "splits": {SPLIT: {"prefix": PREFIX, "documents": N, "tokens": N, "text_bytes": N, "unigram_loss": NATS}},
     "files": {NAME: BYTES}, "settings": {...}}

Manifests of earlier releases lack some of these keys. A shard without a manifest, or with one of other files, is
Megatron's own or a copy: nothing is known of it. Imports neither torch nor Megatron.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class ShardFacts:
    """Of one shard. What an earlier release did not write down is None.

    Attributes:
        manifest: its file.
        tokenizer, tokenizer_sha256, vocab_size: what made the tokens.
        tokens, text_bytes: of this shard; bytes of UTF-8 before they became tokens.
        unigram_loss: nats/token of this (validation) shard under the frequencies of tokens of its training shard.
    """

    manifest: Path
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    tokens: int | None = None
    text_bytes: int | None = None
    unigram_loss: float | None = None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text that a token stands for, end-of-document tokens included."""
        return self.text_bytes / self.tokens if self.text_bytes and self.tokens else None


def shard_facts(prefix: str | Path) -> ShardFacts | None:
    """What is written down about PREFIX.bin; None where nothing is, or where the file is not the one described."""
    path = Path(prefix)
    candidates = [("train", path)]
    for split in SPLITS:
        if path.name.endswith(f"-{split}"):
            candidates.append((split, path.with_name(path.name.removesuffix(f"-{split}"))))
    for split, base in candidates:
        manifest = Path(f"{base}.json")
        try:
            values = json.loads(manifest.read_text(encoding="utf-8"))
            if values["files"][f"{path.name}.bin"] == Path(f"{path}.bin").stat().st_size:
                return _facts(manifest, values, split)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # none, or none of ours
            continue
    return None


def _facts(manifest: Path, values: dict[str, Any], split: str) -> ShardFacts:
    own = values.get("splits", {}).get(split, {})
    tokenizer, digest, size = values["tokenizer"], values["tokenizer_sha256"], values["vocab_size"]
    if not (isinstance(tokenizer, str) and isinstance(digest, str) and isinstance(size, int)):
        raise TypeError(f"{manifest}: of another form")
    return ShardFacts(
        *(manifest, tokenizer, digest, size),
        tokens=own["tokens"] if isinstance(own.get("tokens"), int) else None,
        text_bytes=own["text_bytes"] if isinstance(own.get("text_bytes"), int) else None,
        unigram_loss=own["unigram_loss"] if isinstance(own.get("unigram_loss"), float) else None,
    )
