"""JSON files changed as people, disks and other programs change them: other values, other shapes, other bytes."""

import json
from pathlib import Path
from typing import Any

from bad_values import Draw, flipped

VALUES = (
    *(
        "null",
        "true",
        "0",
        "-1",
        "1",
        "2",
        "3",
        "1.5",
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "-0.0",
        "1e-400",
        '""',
        '"x"',
    ),
    *(
        str(2**31),
        str(2**53 + 1),
        str(2**63),
        str(2**64),
        "9" * 400,
        "9" * 5000,
        '"9"',
        '"NaN"',
        "[]",
        "{}",
        "[1]",
        "[[1]]",
    ),
    *(
        '"../../beside/precious.yaml"',
        '"/etc/passwd"',
        '"\\u0000"',
        '"\\ud800"',
        '"\\u001b[2J"',
        '"a\\nsbn: b"',
        '"\\u202e"',
    ),
    *(
        '{"a": 1, "a": 2}',
        '"FINISHED"',
        '"RUNNING"',
    ),
    *('"' + "x" * 300 + '"', "[" * 3000, '{"a":' * 3000, "[" * 300 + "]" * 300, "'x'", "x", ""),
)
KEYS = (
    "step",
    "time",
    "loss",
    "",
    "a/b",
    "../x",
    "\x1b[2J",
    "\u00e9",
    "x" * 300,
    "a\nb",
    "validation_loss",
    "__class__",
    "0",
)


def changed_text(draw: Draw, value: Any, times: int | None = None) -> str:
    """JSON of a value in which some parts are other values, some keys missing or new."""
    copy = json.loads(json.dumps(value))
    marks = []
    for number in range(times or draw.choice((1, 1, 2, 3))):
        mark = f"mark{number}mark"
        place = _place(draw, copy)
        if place is None:
            copy = mark
            marks.append(mark)
            continue
        holder, key = place
        if isinstance(holder, dict) and draw.random() < 0.15:
            del holder[key]
        elif isinstance(holder, dict) and draw.random() < 0.15:
            holder[draw.choice(KEYS)] = mark
            marks.append(mark)
        elif isinstance(holder, list) and draw.random() < 0.3:
            holder[:] = draw.choice(([], holder * 2, holder[:-1], holder[::-1]))
        else:
            holder[key] = _near(draw, holder[key]) if draw.random() < 0.4 else mark
            marks.append(mark)
    text = json.dumps(copy)
    for mark in marks:
        text = text.replace(f'"{mark}"', draw.choice(VALUES))
    return text


def damaged(draw: Draw, path: Path) -> None:
    """Cuts, flips, empties or replaces the bytes of a file, or puts something else in its place."""
    content = path.read_bytes()
    kind = draw.choice(("cut", "flip", "flip", "empty", "garbage", "twice", "folder", "loop", "gone", "zeros"))
    if kind in ("folder", "loop", "gone"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)
        return
    path.write_bytes(
        {
            "cut": content[: draw.randrange(len(content) + 1)],
            "flip": flipped(draw, content),
            "empty": b"",
            "garbage": draw.randbytes(draw.randrange(300)),
            "twice": content + content,
            "zeros": bytes(len(content)),
        }[kind]
    )


def _near(draw: Draw, value: Any) -> Any:
    """One more, one less, or another of its kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice((value + 1, value - 1, 2 * value, -value, 0, 10**9, 10**18))
    if isinstance(value, float):
        return draw.choice((-value, 0.0, value * 1e300, 1e-300))
    if isinstance(value, str):
        return draw.choice((value[:-1], value + "x", value.upper(), "../" + value, value[::-1]))
    return value


def _place(draw: Draw, value: Any) -> tuple[Any, Any] | None:
    """Somewhere in the tree: (what holds it, its key); None for the whole."""
    holder, key = None, None
    while isinstance(value, (dict, list)) and value and (holder is None or draw.random() < 0.75):
        holder, key = value, draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        value = holder[key]
    return None if holder is None else (holder, key)
