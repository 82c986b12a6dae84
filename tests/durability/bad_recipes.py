"""Recipes and sweep files that no careful person would write.

Each function draws one case and writes its files into a folder. Texts are made from a good recipe: values, keys and
sections are replaced, YAML is broken, bytes are changed; a part of what comes out is still good, and must work.
"""

from pathlib import Path
from typing import Any

import yaml
from bad_values import (
    KEYS,
    PIECES,
    Draw,
    bomb,
    fitting,
    flipped,
    good_values,
    keys,
    nest,
    odd_output,
    override,
    text_of,
    write,
)
from sandbox import Case

PARENTS = (
    *("../../beside/precious.yaml", "/etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/self/environ"),
    *("..", "", "~/x.yaml", '"\\0"', "a/" * 3000, "x" * 300, "http://127.0.0.1:9/x.yaml", "[a, b]", "5", "{a: b}"),
    '"\\ud800"',
)
PATHS = ("", ".", "\0", "x" * 5000, "/dev/null", "/dev/zero", "/etc/passwd", "~", "\udcff", "a\nb", "\x1b[2J")


def recipe_case(draw: Draw, folder: Path) -> Case:
    """A recipe file, its parents and overrides, for a command that reads one."""
    kinds = (_fitting, changed_recipe, _broken, _nested, _bomb, _many_keys, _extending, _odd_path)
    make = draw.choices(kinds, (35, 30, 12, 3, 5, 1, 10, 4))[0]
    path = make(draw, folder)
    few = (0,) if make is _fitting else (0, 0, 0, 1, 1, 2)
    words = [path, *(override(draw, folder) for _ in range(draw.choice(few)))]
    entry, before, after = draw.choice(
        (
            ("train", [], []),
            ("cli", ["train"], []),
            ("cli", ["doctor"], []),
            ("cli", ["plan"], ["--nodes", "1", "--device", "h100"]),
            ("cli", ["plan"], ["--nodes", "2", "--device", "a100", "--json", odd_output(draw, folder)]),
            ("cli", ["submit"], ["--dry-run"]),
            ("job", ["begin"], []),
            ("job", ["end"], []),
        )
    )
    if draw.random() < 0.2:
        words.append(f"run_dir={odd_output(draw, folder)}")
    # What is good would be trained in earnest by a process of its own.
    alone = before != ["train"] and entry != "train"
    return Case("recipe", entry, (*before, *words, *after), alone=alone)


def changed_recipe(draw: Draw, folder: Path) -> str:
    """A file recipe.yaml with values of any kind at any key, known or not; returns its path."""

    def change(values: dict[str, Any], mark: str) -> None:
        key = draw.choice(keys()) if draw.random() < 0.85 else draw.choice(KEYS)
        section, _, name = key.partition(".")
        if name and isinstance(values.setdefault(section, {}), dict):
            values[section][name] = mark
        else:
            values[section] = mark

    return write(folder / "recipe.yaml", text_of(draw, folder, good_values(draw), change))


def _fitting(draw: Draw, folder: Path) -> str:
    """Values of the right types, in combinations that nobody has tried."""
    values = good_values(draw)
    known = [key for key in keys() if "." in key and key not in ("data.train", "optimizer.stages", "linear.phases")]
    for _ in range(draw.randint(1, 6)):
        section, _, name = draw.choice(known).partition(".")
        values.setdefault(section, {})[name] = fitting(draw, f"{section}.{name}")
    return write(folder / "recipe.yaml", yaml.safe_dump(values, sort_keys=False))


def _broken(draw: Draw, folder: Path) -> str:
    """Characters or bytes changed, cut, or in another encoding."""
    content = yaml.safe_dump(good_values(draw), sort_keys=False)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        cut = draw.choice((0, 0, 1, 5, 50))
        content = content[:at] + draw.choice(PIECES) + content[at + cut :]
    data = content.encode()
    kind = draw.choice(("none", "none", "flip", "utf-16", "bom", "cut", "garbage", "empty"))
    if kind == "flip":
        data = flipped(draw, data)
    elif kind == "cut":
        data = data[: draw.randrange(len(data))]
    elif kind in ("utf-16", "bom"):
        data = content.encode("utf-16" if kind == "utf-16" else "utf-8-sig")
    elif kind in ("garbage", "empty"):
        data = draw.randbytes(draw.randrange(400)) if kind == "garbage" else b""
    (folder / "recipe.yaml").write_bytes(data)
    return str(folder / "recipe.yaml")


def _nested(draw: Draw, folder: Path) -> str:
    text = nest(draw)
    return write(folder / "recipe.yaml", draw.choice((text, f"model: {text}", f"name: x\n{text}")))


def _bomb(draw: Draw, folder: Path) -> str:
    text = bomb(draw)
    section = draw.choice(("", "model: ", "name: ", "data: ", "linear: {phases: ", "extends: "))
    good = yaml.safe_dump(good_values(draw))
    return write(folder / "recipe.yaml", f"{good}\n{section}{text}\n" if section else text)


def _many_keys(draw: Draw, folder: Path) -> str:
    """Large files of little sense."""
    text = draw.choice(
        (
            "\n".join(f"k{i}: {i}" for i in range(20000)),
            f"name: {'x' * 2_000_000}",
            "# nothing\n" * 100_000,
            f"model: [{', '.join(['1'] * 50000)}]",
            f"data: {{train: [{', '.join(['tokens'] * 3000)}]}}",
        )
    )
    return write(folder / "recipe.yaml", text)


def _extending(draw: Draw, folder: Path) -> str:
    """Parents that are cycles, chains, tricks or no recipes."""
    good = yaml.safe_dump(good_values(draw), sort_keys=False)
    kind = draw.choice(("cycle", "chain", "path", "path", "link", "folder"))
    if kind == "cycle":
        length = draw.choice((1, 2, 5))
        for i in range(length):
            write(folder / f"{i}.yaml", f"extends: {(i + 1) % length}.yaml\n{good}")
        return str(folder / "0.yaml")
    if kind == "chain":
        length = draw.choice((3, 50, 3000))
        for i in range(length):
            write(
                folder / f"{i}.yaml",
                good if i == length - 1 else f"extends: {i + 1}.yaml\nmodel: {{num_layers: {i + 1}}}\n",
            )
        return str(folder / "0.yaml")
    if kind == "link":
        (folder / "loop.yaml").symlink_to("loop.yaml")
    elif kind == "folder":
        (folder / "loop.yaml").mkdir()
    parent = draw.choice(PARENTS) if kind == "path" else "loop.yaml"
    return write(folder / "recipe.yaml", f"extends: {parent}\n{good}")


def _odd_path(draw: Draw, folder: Path) -> str:
    (folder / "loop").symlink_to("loop")
    (folder / "binary.yaml").write_bytes(draw.randbytes(100))
    own = [str(folder / name) for name in (".", "none.yaml", "loop", "binary.yaml", "none.yaml/x")]
    return draw.choice((*own, *PATHS))


def sweep_case(draw: Draw, folder: Path) -> Case:
    """A sweep file over a good recipe, and what is done with it."""
    write(folder / "base.yaml", yaml.safe_dump(good_values(draw), sort_keys=False))
    values: dict[str, Any] = {
        "name": "study",
        "recipe": "base.yaml",
        "set": {"training.steps": 2},
        "axes": {
            "format": {"ternary": {"linear.weight_format": "ternary"}, "bf16": {"linear.weight_format": "dense"}},
            "linear.sparsity": ["8:8", "6:8"],
        },
    }

    def change(tree: dict[str, Any], mark: str) -> None:
        place = draw.choice(
            ("name", "recipe", "set", "axes", "axis", "axis", "variant", "set key", "values", "ranks", "key")
        )
        axes = tree["axes"] if isinstance(tree["axes"], dict) else {}
        if place in ("name", "recipe", "set", "axes"):
            tree[place] = mark
        elif place in ("axis", "variant", "values"):
            axes[draw.choice((*KEYS, *keys()))] = {"axis": mark, "variant": {"a": mark}, "values": [1, mark]}[place]
        elif place == "ranks":
            axes["ranks"] = [1, mark]
        elif place == "set key" and isinstance(tree["set"], dict):
            tree["set"][draw.choice((*KEYS, *keys()))] = mark
        else:
            tree[draw.choice(KEYS)] = mark

    text = text_of(draw, folder, values, change)
    extra = draw.random()
    if extra < 0.05:
        text = yaml.safe_dump(values | {"axes": {f"a{i}": {f"v{j}": {} for j in range(10)} for i in range(12)}})
    elif extra < 0.1:
        text = f"name: study\nrecipe: base.yaml\naxes: {bomb(draw)}\n"
    elif extra < 0.15:
        text = text[: draw.randrange(len(text))]
    path = write(folder / "sweep.yaml", text)
    number = draw.choice(("0", "-1", "3", "99", "9" * 30, "x", ""))
    written = ["write", path, "--output", odd_output(draw, folder)]
    listed, run, submitted = ["list", path], ["run", path, "--number", number], ["submit", path, "--dry-run"]
    words = draw.choice((listed, listed, written, run, submitted, [path]))
    return Case("sweep", "cli", ("sweep", *words), alone=words[0] != "run")
