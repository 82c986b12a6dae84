"""Token shards, tokenizer models and text that are damaged, forged or something else altogether."""

import gzip
import json
import pickle
import struct
from pathlib import Path

from bad_json import changed_text, damaged
from bad_recipes import PATHS
from bad_values import Draw, flipped, odd_output, write
from good_input import good_input, recipe_text
from sandbox import CANARY, Case

HEADER = struct.Struct("<9sQBQQ")
TEXT_NAMES = (
    *("a.txt", "a.jsonl", "a.json", "a.parquet", "a.txt.gz", "a.jsonl.zst", "a.xz", "a.jsonl.bz2", "a.ndjson"),
)
NUMBERS = (0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


class Planted:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (open, (str(self.path), "w"))


def shard_case(draw: Draw, folder: Path) -> Case:
    """A rank that is to train on a shard in which something is wrong."""
    for name in ("corpus-train.bin", "corpus-train.idx"):
        (folder / name).write_bytes((good_input(folder) / name).read_bytes())
    prefix = folder / "corpus-train"
    draw.choices((_index, _numbers, _tokens, _either, _garbage), (5, 5, 3, 3, 2))[0](draw, folder)
    weighed = f"{{path: {prefix}, weight: {draw.choice(('1e-300', '1e300', '5', '1e-9'))}}}"
    blends = [f"[{one}, {good_input(folder)}/corpus-train]" for one in (prefix, weighed)]
    data = draw.choice((str(prefix), str(prefix), str(prefix), f"{prefix}.bin", *blends))
    text = recipe_text(good_input(folder), data, "tracking: {enabled: false}").replace("interval: 1,", "interval: 0,")
    if draw.random() < 0.3:
        text = text.replace(f"validation: {good_input(folder)}/corpus-validation", f"validation: {prefix}")
    if draw.random() < 0.1:
        text = text.replace("seq_length: 16", f"seq_length: {draw.choice((1, 2, 1000, 100000))}")
    return Case("shard", "train", (write(folder / "recipe.yaml", text), "run_dir=run", "training.steps=2"), stops=False)


def _index(draw: Draw, folder: Path) -> None:
    """Another header: magic, version, type of tokens, counts."""
    path = folder / "corpus-train.idx"
    content = path.read_bytes()
    fields = list(HEADER.unpack(content[: HEADER.size]))
    at = draw.randrange(5)
    fields[at] = draw.choice((b"MMIDIDX\x00\x01", b"", b"PK\x03\x04")) if at == 0 else draw.choice(NUMBERS)
    fields[2] = fields[2] if at != 2 else draw.randrange(256) if draw.random() < 0.5 else draw.randrange(10)
    if at in (3, 4) and draw.random() < 0.5:
        fields[at] = HEADER.unpack(content[: HEADER.size])[at] + draw.choice((-1, 1))
    path.write_bytes(HEADER.pack(*fields) + content[HEADER.size :])


def _numbers(draw: Draw, folder: Path) -> None:
    """Other lengths, offsets or marks of documents."""
    path = folder / "corpus-train.idx"
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 3)):
        at = HEADER.size + 4 * draw.randrange((len(content) - HEADER.size) // 4)
        struct.pack_into("<I", content, at, draw.choice(NUMBERS) & 0xFFFFFFFF)
    path.write_bytes(content)


def _tokens(draw: Draw, folder: Path) -> None:
    """Tokens that no vocabulary has, or fewer or more of them than the index says."""
    path = folder / "corpus-train.bin"
    content = bytearray(path.read_bytes())
    kind = draw.choice(("one", "all", "cut", "more"))
    if kind == "one":
        at = 2 * draw.randrange(len(content) // 2)
        content[at : at + 2] = b"\xff\xff"
    elif kind == "all":
        content[:] = bytes([draw.randrange(256)]) * len(content)
    else:
        content = content[: draw.randrange(len(content))] if kind == "cut" else content + b"\0" * draw.randint(1, 9)
    path.write_bytes(content)


def _either(draw: Draw, folder: Path) -> None:
    damaged(draw, folder / draw.choice(("corpus-train.bin", "corpus-train.idx")))


def _garbage(draw: Draw, folder: Path) -> None:
    """Other files under the shard's names."""
    planted = pickle.dumps(Planted(folder / CANARY))
    for name in ("corpus-train.bin", "corpus-train.idx")[draw.randrange(2) :]:
        choice = (
            planted,
            gzip.compress(b"tokens"),
            b"\x93NUMPY\x01\x00" + planted,
            draw.randbytes(5000),
            bytes(1 << 20),
        )
        (folder / name).write_bytes(draw.choice(choice))


def tokenizer_case(draw: Draw, folder: Path) -> Case:
    """A tokenizer model that is none, or no longer what it was."""
    content = (good_input(folder) / "corpus.model").read_bytes()
    path = folder / "bad.model"
    kind = draw.choice(("flip", "flip", "flip", "many flips", "cut", "splice", "garbage", "pickle", "other", "path"))
    if kind in ("flip", "many flips"):
        path.write_bytes(flipped(draw, content, 3 if kind == "flip" else 300))
    elif kind == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "splice":
        at, other, length = (draw.randrange(len(content)) for _ in range(3))
        path.write_bytes(content[:at] + content[other : other + length] + content[at:])
    else:
        path.write_bytes(
            {"garbage": draw.randbytes(draw.randrange(3000)), "pickle": pickle.dumps(Planted(folder / CANARY))}.get(
                kind, b"name: good\n"
            )
        )
    word = draw.choice((*PATHS, str(folder))) if kind == "path" else str(path)
    words = ("--input", str(good_input(folder) / "text.txt"), "--output", "made", "--tokenizer", word, "--workers", "1")
    return Case("tokenizer", "cli", ("prepare", *words))


def corpus_case(draw: Draw, folder: Path) -> Case:
    """Text of all kinds that is no text, and what is left of a corpus that was made before."""
    name = draw.choice(TEXT_NAMES)
    path = folder / name
    good = "\n".join(f'{{"text": "the cat {i} sat"}}' for i in range(30))
    kind = draw.choice(("garbage", "text", "lines", "lines", "planted", "path", "empty", "zip"))
    if kind == "lines":
        lines = good.splitlines()
        for _ in range(draw.randint(1, 4)):
            lines[draw.randrange(len(lines))] = changed_text(draw, {"text": "the cat sat", "meta": {"id": 5}})
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(
            {
                "garbage": draw.randbytes(draw.randrange(5000)), "text": flipped(draw, good.encode(), 20),
                "planted": pickle.dumps(Planted(folder / CANARY)), "empty": b"", "path": b"x",
                "zip": flipped(draw, gzip.compress(good.encode()), 2),
            }[kind]
        )  # fmt: skip
    inputs = (
        [draw.choice(PATHS), f"{folder}/*", "[", f"{folder}/**/../*"][draw.randrange(4)]
        if kind == "path"
        else str(path)
    )
    output = draw.choice(("made", "made", "made", odd_output(draw, folder)))
    words = ["--input", inputs, "--output", output, "--tokenizer", str(good_input(folder) / "corpus.model")]
    words += draw.choice(([], [], ["--skip-bad"], ["--text-field", "meta"], ["--text-field", "\x1b"], ["--seed", "-1"]))
    words += draw.choice(([], [], ["--validation-fraction", draw.choice(("0.5", "nan", "1", "-1", "1e-300", "inf"))]))
    if draw.random() < 0.2:
        manifest = (good_input(folder) / "corpus.json").read_text()
        write(folder.parent / "cwd" / "made.json", changed_text(draw, json.loads(manifest)))
    return Case("corpus", "cli", ("prepare", *words, "--workers", "1"))
