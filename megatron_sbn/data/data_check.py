"""What can be known of a recipe's data in a second, before torch is imported and ranks are started.

Shards and tokenizer are there; all shards were made with the tokenizer that the recipe names, or with one at least;
model.vocab_size has room for it; validation is not what is trained on. What is not written down about a shard
(Megatron's own tools write no manifest) is not checked.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_sbn.config import Recipe
from megatron_sbn.data.manifest import ShardFacts, shard_facts
from megatron_sbn.errors import InputError

QUICKSTART_DATA = "runs/quickstart-data"
_WIDE = 2  # times the tokenizer's vocabulary; less is padding
_PROBES, _PROBE_BYTES = 16, 1 << 16


def check_data(recipe: Recipe) -> list[str]:
    """Warnings about the data of a recipe, one line each.

    Raises InputError for what is missing and what does not belong together.
    """
    missing = missing_files(recipe)
    if missing:
        raise InputError(missing[0])
    known = [(field, path, facts) for field, path in shards(recipe) if (facts := shard_facts(path)) is not None]
    _check_tokenizer(recipe, known)
    return [*_check_vocabulary(recipe, known), *_check_validation(recipe)]


def warn_of_data(recipe: Recipe) -> None:
    """`check_data`, its warnings on standard error."""
    for line in check_data(recipe):
        print(f"sbn: warning: {line}", file=sys.stderr)


def shards(recipe: Recipe) -> list[tuple[str, str]]:
    """(field, prefix) of every shard, each once."""
    data = recipe.data
    named = [("data.train", shard.path) for shard in data.train]
    named += [("data.validation", shard.path) for shard in data.validation or ()]
    return list(dict.fromkeys(named))


def missing_files(recipe: Recipe) -> list[str]:
    """A line for every file that the recipe names and that is not there, with the way out."""
    return list(_missing(recipe))


def _missing(recipe: Recipe) -> Iterator[str]:
    for field, prefix in shards(recipe):
        path = next((path for s in ("idx", "bin") if not _is_file(path := f"{prefix}.{s}")), None)
        if path is not None:
            yield f"{field}: {path}: no such token shard; {_way_out(prefix)}"
    tokenizer = recipe.data.tokenizer
    if tokenizer is not None and not _is_file(tokenizer):
        yield (
            f"data.tokenizer = {tokenizer}: no such file; name the tokenizer that made the shards, "
            "or set data.tokenizer=null"
        )


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _way_out(prefix: str) -> str:
    if Path(prefix).parent == Path(QUICKSTART_DATA):
        return "`sbn quickstart --prepare-only` writes it"
    if prefix.endswith((".bin", ".idx")):
        return f"name the shard without {prefix[-4:]}"
    return "`sbn prepare` writes one"


def _check_tokenizer(recipe: Recipe, known: list[tuple[str, str, ShardFacts]]) -> None:
    """Raises InputError for a shard of another tokenizer than the recipe's, or than the first shard's."""
    if not known:
        return
    named = recipe.data.tokenizer
    first_field, first_path, first = known[0]
    expected = first.tokenizer_sha256
    other = f"{first_field} = {first_path} ({first.tokenizer})"
    if named is not None:
        try:
            expected = hashlib.sha256(Path(named).read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"data.tokenizer = {named}: cannot be read: {error.strerror}") from error
        other = f"data.tokenizer = {named}"
    for field, path, facts in known:
        if facts.tokenizer_sha256 != expected:
            raise InputError(
                f"{field}: {path} was made with another tokenizer, {facts.tokenizer} (sha256 "
                f"{facts.tokenizer_sha256[:12]}), than {other} (sha256 {expected[:12]}); name the one that made it, "
                "or prepare the text again with `sbn prepare --tokenizer`"
            )


def _check_vocabulary(recipe: Recipe, known: list[tuple[str, str, ShardFacts]]) -> Iterator[str]:
    """A warning of an embedding that is far too wide. Raises InputError for one that is too small."""
    if not known:
        return
    field, path, facts = max(known, key=lambda item: item[2].vocab_size)
    have, need = recipe.model.vocab_size, facts.vocab_size
    if have < need:
        raise InputError(
            f"model.vocab_size = {have} is smaller than the {need} of the tokenizer that made {field} = {path} "
            f"({facts.manifest}); set model.vocab_size={need}"
        )
    if have > _WIDE * need:
        yield (
            f"model.vocab_size = {have} is more than {_WIDE} times the {need} of the tokenizer that made {path}: rows "
            f"of the embedding that no text uses; model.vocab_size={need} has none"
        )


def _check_validation(recipe: Recipe) -> Iterator[str]:
    """A warning of a validation shard that is one of several trained on. Raises InputError if nothing else is."""
    train = list(dict.fromkeys(shard.path for shard in recipe.data.train))
    held_out = list(dict.fromkeys(shard.path for shard in recipe.data.validation or ()))
    by_size: dict[int, list[str]] = {}
    for path in train:
        by_size.setdefault(Path(f"{path}.bin").stat().st_size, []).append(path)
    pairs = []
    for path in held_out:
        alike = by_size.get(Path(f"{path}.bin").stat().st_size, [])
        pairs += [(path, other) for other in alike if _same_tokens(path, other)]
    if not pairs:
        return
    path, other = pairs[0]
    same = f"data.validation = {path} holds the same tokens as data.train = {other}"
    if {other for _, other in pairs} >= set(train):
        raise InputError(
            f"{same}: validation would measure what was learned by heart; name held-out text, which "
            "`sbn prepare --validation-fraction` sets aside, or leave data.validation out"
        )
    yield f"{same}, a part of what is trained on: validation measures in part what was learned by heart"


def _same_tokens(one: str, other: str) -> bool:
    """Whether two .bin files of one size are one file, or equal at sixteen places (small ones: everywhere)."""
    first, second = Path(f"{one}.bin"), Path(f"{other}.bin")
    if first.samefile(second):
        return True
    size = first.stat().st_size
    step = max(_PROBE_BYTES, size // _PROBES)
    with first.open("rb", buffering=0) as a, second.open("rb", buffering=0) as b:
        for start in range(0, size, step):
            pieces = [os.pread(file.fileno(), _PROBE_BYTES, start) for file in (a, b)]
            if pieces[0] != pieces[1]:
                return False
    return True
