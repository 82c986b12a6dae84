"""What bad input is made of: values, keys and pieces of YAML, a good recipe to put them in, changed bytes."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from sandbox import CANARY, SECRET

from megatron_sbn.config import Recipe

Draw = random.Random
SECRET_URIS = (
    f"http://someone:{SECRET}@127.0.0.1:9",
    f"postgresql://someone:{SECRET}@127.0.0.1:9/runs",
    f"mysql+pymysql://someone:{SECRET}%40x@127.0.0.1:9/runs",
    f"sqlite:///runs.db?password={SECRET}",
    f"http://127.0.0.1:9?token={SECRET}",
)
RUN_COMMAND = (
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/apply:subprocess.check_output [[touch, '{canary}']]",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object:os.system {{}}",
)
SCALARS = (
    *("", "~", "true", "no", "0", "-0", "-1", "1", "2", "3", "7", "8", "64", "010", "0x10", "1_000", "+5", "5.0", "5."),
    *("1e3", "1e308", "1e309", "-1e309", "1e-400", ".inf", "-.inf", ".nan", "4294967296", "12:30:45", "2024-01-01"),
    *(str(2**63), str(2**64), "9" * 30, "9" * 310, "9" * 4300, "9" * 5000, "-" + "9" * 400, "0." + "0" * 400 + "1"),
    *("6:8", "0:8", "8:6", "32:32", "33:64", "-1:2", "9" * 400 + ":" + "9" * 400, '"6:8\\n"', '"\\u0661:\\u0662"'),
    *(
        '"\\0"',
        '"\\ud800"',
        '"\\U0001F600"',
        '"\\e[2J"',
        '"a\\nsbn: b"',
        '"\\u202e"',
        '"\\x85"',
        '" "',
        "'" + "x" * 300 + "'",
    ),
    *(
        "../../beside/precious.yaml",
        "/etc/passwd",
        "/dev/zero",
        "a/b",
        ".",
        "..",
        "~",
        "-rf",
        "$(touch x)",
        "a b",
        "%s%n",
    ),
    *(
        "!!binary aGk=",
        "!!set {a}",
        "!!omap [a: 1]",
        "!!timestamp x",
        "!!int x",
        "!!float y",
        "!!null z",
        "!x y",
        "*no",
        "|",
    ),
    *(
        "[]",
        "[1]",
        "[1, 2]",
        "[[[]]]",
        "[a, {b: c}]",
        "{}",
        "{a: 1}",
        "{1: 2}",
        "{[1]: 2}",
        "{? {a: 1} : 2}",
        "{a: 1, a: 2}",
    ),
    *("&a [*a]", "&a {x: *a}", "[&b x, *b]", "{<<: {steps: 1}}", "{<<: [1]}", "@x", "`x", "%x", "]", "}", "'", '"'),
)
# What a recipe may well say, at the right key.
MILD = (
    *(
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
        "8",
        "16",
        "32",
        "48",
        "64",
        "96",
        "100",
        "128",
        "0.0",
        "0.5",
        "1.0",
        "1e-3",
        "3e-4",
    ),
    *("true", "false", "~", "none", "full", "ternary", "dense", "cpu", "auto", "constant", "8:8", "6:8", "2:4", "1:32"),
    *("tokens", "[tokens, tokens]", "{path: tokens, weight: 2}", "[{step: 0}]", "[]", "9007199254740992"),
)
PIECES = (
    "\t",
    "\n",
    " ",
    ":",
    "-",
    "{",
    "}",
    "[",
    "]",
    "&a ",
    "*a",
    "!!",
    "|",
    ">",
    "#",
    "'",
    '"',
    "? ",
    "%",
    "\0",
    "---\n",
    "...\n",
)
KEYS = (
    *(
        "training.stpes",
        "model",
        "a.b.c.d",
        "..",
        ".",
        "",
        "model.",
        ".steps",
        "extends",
        "name.x",
        "data.train.0",
        "<<",
    ),
    *(
        "model.hidden_size.x",
        "optimizer.stages.0.lr",
        "linear.phases",
        "\u00e9",
        "\x1b[2J",
        "a" * 2000,
        "a\nb",
        "~",
        "1",
    ),
)


def keys(section: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key of a recipe."""
    found = []
    for name, field in section.model_fields.items():
        found.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += keys(field.annotation, f"{prefix}{name}.")
    return found


def fitting(draw: Draw, key: str) -> object:
    """A value of the right type for a key, whether it makes sense there or not."""
    section: Any = Recipe
    *names, last = key.split(".")
    for name in names:
        section = section.model_fields[name].annotation
    annotation = str(section.model_fields[last].annotation)
    if "Literal" in annotation:
        return draw.choice(re.findall(r"'(\w+)'|\b(\d+)\b", annotation) or [("x", "")])[0] or 8
    if "bool" in annotation:
        return draw.random() < 0.5
    if "float" in annotation:
        return draw.choice((0.0, 1e-8, 1e-4, 0.01, 0.5, 0.95, 1.0, 10.0, 1e30))
    if "int" in annotation:
        return draw.choice((0, 1, 1, 2, 2, 3, 4, 4, 6, 8, 12, 16, 32, 64, 96, 100, 128, 1000, 2**20, 2**40, 2**53))
    return draw.choice(("x", "6:8", "2:4", None, "a.b-c"))


def good_values(draw: Draw) -> dict[str, Any]:
    """A recipe that can be trained, as far as its shards are there."""
    values: dict[str, Any] = {
        "name": "good",
        "model": {
            "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2, "seq_length": 16,
            "vocab_size": 128, "bf16": False,
        },
        "data": {"train": "tokens"},
        "training": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2},
        "tracking": {"uri": draw.choice(SECRET_URIS)} if draw.random() < 0.3 else {"enabled": False},
    }  # fmt: skip
    if draw.random() < 0.2:
        values["linear"] = {"phases": [{"step": 0, "sparsity": "2:4"}, {"step": 2, "activation_bits": "none"}]}
    if draw.random() < 0.2:
        values["optimizer"] = {"stages": [{"step": 0, "lr": 1e-3, "end_lr": 1e-4, "weight_decay": 0.1}]}
    return values


def value(draw: Draw, folder: Path) -> str:
    """A value, as YAML text on one line."""
    if draw.random() < 0.4:
        return draw.choice(MILD)
    if draw.random() < 0.1:
        return draw.choice(RUN_COMMAND).format(canary=folder / CANARY)
    if draw.random() < 0.1:
        return draw.choice(SECRET_URIS)
    return draw.choice(SCALARS)


def text_of(draw: Draw, folder: Path, values: dict[str, Any], change: Callable[[dict[str, Any], str], None]) -> str:
    """YAML of values in which some are replaced by text that no dump would write; `change` puts a mark in."""
    marks = []
    for number in range(draw.choice((1, 1, 1, 2, 3))):
        marks.append(f"mark{number}mark")
        change(values, marks[-1])
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=10**6)
    for mark in marks:
        text = text.replace(mark, value(draw, folder))
    return text


def override(draw: Draw, folder: Path) -> str:
    """`section.key=value`, or something like it."""
    key = draw.choice(keys()) if draw.random() < 0.7 else draw.choice(KEYS)
    if draw.random() < 0.1:
        return draw.choice((key, f"={key}", "=", f"{key}==", f"{key}=[", f"{key}={nest(draw)}", f"{key}={bomb(draw)}"))
    return f"{key}={value(draw, folder)}"


def nest(draw: Draw) -> str:
    """Brackets in brackets."""
    depth = draw.choice((10, 100, 1000, 20000))
    return draw.choice(
        ("[" * depth, "{a: " * depth, "[" * depth + "]" * depth, "- " * depth, "? " * depth, "&a " * depth)
    )


def bomb(draw: Draw) -> str:
    """A few lines that stand for very many values, on one line."""
    levels, width = draw.choice(((4, 9), (9, 9), (30, 2), (60, 9)))
    rows = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    if draw.random() < 0.5:
        rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    else:
        rows = ["a0: &a0 {k0: x}"]
        rows += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * width)}], k{i}: x}}" for i in range(1, levels)]
    return f"{{{', '.join(rows)}}}"


def odd_output(draw: Draw, folder: Path) -> str:
    """Where a result is to go: a new place, or one where nothing can."""
    occupied = write(folder / "occupied", "x")
    loop = folder / "loop-of-output"
    if not loop.is_symlink():
        loop.symlink_to(loop.name)
    return draw.choice(
        ("out", "a/b/c", "", ".", "x" * 300, "a\0b", "\udcff", "a\nb", occupied, f"{occupied}/x", str(loop))
    )


def flipped(draw: Draw, data: bytes, most: int = 8) -> bytes:
    """Some bits of it changed."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, most) if data else 0):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def write(path: Path, text: str) -> str:
    """Writes a file; returns its path as a word for a command."""
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    return str(path)
