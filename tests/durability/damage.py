"""What a disk, a full quota or a careless hand does to the files of a checkpoint, whatever their format."""

import random
from pathlib import Path


def damage(checkpoint: Path, draw: random.Random) -> str:
    """Damages one file of the folder, drawn at random: cut, a bit flipped, emptied or removed; says what was done."""
    path = draw.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
    content = path.read_bytes()
    kind = draw.choice(("cut", "flipped", "emptied", "removed"))
    if kind == "removed":
        path.unlink()
        return f"{path.name} removed"
    if kind == "flipped":
        bit = draw.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        return f"{path.name}: bit {bit} flipped"
    size = draw.randrange(1, len(content)) if kind == "cut" else 0
    path.write_bytes(content[:size])
    return f"{path.name} cut to {size} of {len(content)} bytes"


def newest_two(checkpoints: Path, latest: int) -> tuple[Path, int] | None:
    """The checkpoint of step `latest`, and the step of the one before it; None unless it is the newest of several."""
    steps = sorted(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))
    if len(steps) < 2 or steps[-1] != latest:
        return None
    return checkpoints / f"step-{latest:08d}", steps[-2]
