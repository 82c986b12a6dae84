"""Checkpoints that are damaged, and checkpoints that are forged: whole by their own checksums, and wrong.

Whoever gets a checkpoint from elsewhere starts from it: names that lead elsewhere, tensors that are not what the
manifest says, counts that no memory holds, and files that would run something.
"""

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_data import Planted
from bad_json import changed_text, damaged
from bad_runs import LATEST
from bad_values import Draw, flipped, write
from good_input import good_input, recipe_text
from sandbox import CANARY, Case

NAMES = (
    *(
        "../shard-00000-0.safetensors",
        "/etc/passwd",
        "state.json",
        "manifest.json",
        "",
        ".",
        "..",
        "shard-00000-0.safetensors\0",
    ),
    *("shard-00000-9.safetensors", "shard-\u0660\u0660\u0660\u0660\u0660-0.safetensors", "\x1b[2J", "x" * 5000, "a/b"),
    *("__metadata__", "decoder.layers.0.mlp.linear_fc1.weight", "optimizer.exp_avg.x", "masks.x", "telemetry.masks.x"),
)
COUNTS = (0, 1, 2, 3, 15, 17, 10**6, 2**31, 2**53, 2**62, -1)


def checkpoint_case(draw: Draw, folder: Path) -> Case:
    """Shown, verified or continued."""
    run = folder / "run"
    shutil.copytree(good_input(folder) / "study" / "run", run)
    newest = run / "checkpoints" / "step-00000003"
    if draw.random() < 0.5:  # nothing to fall back on
        for older in ("step-00000001", "step-00000002"):
            shutil.rmtree(run / "checkpoints" / older)
    change = draw.choices((_damage, _manifest, _state, _tensors, _boxes, _place), (3, 5, 5, 5, 5, 3))[0]
    change(draw, newest)
    words = draw.choice(
        (["show", str(run)], ["show", str(run), "--tensors"], ["verify", str(run)], ["verify", str(newest)], None)
    )
    if words is not None and draw.random() < 0.5:
        return Case("checkpoint", "cli", ("checkpoint", *words))
    recipe = write(folder / "recipe.yaml", recipe_text(good_input(folder), f"{good_input(folder)}/corpus-train"))
    more = ["training.steps=4", "tracking.enabled=false", f"run_dir={run}"]
    more += draw.choice(([], [], ["checkpoint.resume=required"], ["linear.mask_interval=1"], ["training.seed=5"]))
    return Case("checkpoint", "train", (recipe, *more), stops=False)


def seal(checkpoint: Path, content: Any | None = None) -> None:
    """Makes a checkpoint whole by its own checksums again, with another manifest if one is given."""
    path = checkpoint / "manifest.json"
    if content is None:
        content = json.loads(path.read_bytes())["content"]
        for name in content["files"]:
            file = checkpoint / name
            if file.is_file():
                data = file.read_bytes()
                content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")
    path.write_text(json.dumps({"sha256": hashlib.sha256(text).hexdigest(), "content": content}))


def _damage(draw: Draw, checkpoint: Path) -> None:
    damaged(draw, draw.choice(sorted(checkpoint.iterdir())))


def _manifest(draw: Draw, checkpoint: Path) -> None:
    """Anything else in the manifest, its own checksum right or wrong."""
    path = checkpoint / "manifest.json"
    values = json.loads(path.read_bytes())
    if draw.random() < 0.3:
        path.write_text(changed_text(draw, values), encoding="utf-8", errors="surrogatepass")
        return
    try:
        seal(checkpoint, json.loads(changed_text(draw, values["content"])))
    except (ValueError, RecursionError):  # no JSON any more
        path.write_text("{")


def _state(draw: Draw, checkpoint: Path) -> None:
    """Anything else in state.json, with the right checksums."""
    path = checkpoint / "state.json"
    path.write_text(changed_text(draw, json.loads(path.read_bytes())), encoding="utf-8", errors="surrogatepass")
    seal(checkpoint)


def _tensors(draw: Draw, checkpoint: Path) -> None:
    """A shard with another header or other bytes, with the right checksums."""
    path = draw.choice(sorted(checkpoint.glob("*.safetensors")))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, values = content[8 : 8 + length], content[8 + length :]
    kind = draw.choice(("header", "header", "length", "flip", "values", "pickle", "cut", "nan"))
    if kind == "header":
        header = changed_text(draw, json.loads(header)).encode(errors="surrogatepass")
        length = len(header)
    elif kind == "length":
        length = draw.choice((0, 1, 8, 2**20, 2**31, 2**63 - 1, 2**64 - 1))
    elif kind == "flip":
        header = flipped(draw, header)
    elif kind in ("values", "cut"):
        values = flipped(draw, values, 50) if kind == "values" else values[: draw.randrange(len(values))]
    elif kind == "nan":
        values = b"\xff" * len(values)
    content = length.to_bytes(8, "little") + header + values
    path.write_bytes(pickle.dumps(Planted(checkpoint / CANARY)) if kind == "pickle" else content)
    seal(checkpoint)


def _boxes(draw: Draw, checkpoint: Path) -> None:
    """A manifest that seals itself and says of files and boxes what is not so."""
    content = json.loads((checkpoint / "manifest.json").read_bytes())["content"]
    tensors, files = content["tensors"], content["files"]
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    box = draw.choice(tensor["boxes"])
    changes: tuple[Callable[[], object], ...] = (
        lambda: box.update(file=draw.choice(NAMES)),
        lambda: files.update({draw.choice(NAMES): {"bytes": 5, "sha256": "0" * 64}}),
        lambda: box.update(offsets=[draw.choice(COUNTS) for _ in box["offsets"]]),
        lambda: box.update(sizes=[draw.choice(COUNTS) for _ in box["sizes"]]),
        lambda: tensor.update(shape=[draw.choice(COUNTS) for _ in tensor["shape"]]),
        lambda: tensor.update(shape=[2**31, 2**31], boxes=[box | {"offsets": [0, 0], "sizes": [2**31, 2**31]}]),
        lambda: tensor.update(boxes=tensor["boxes"] * 2),
        lambda: tensor.update(dtype=draw.choice(("U8", "F32", "F64", "BF16", ""))),
        lambda: tensor.update(boxes=[]),
        lambda: tensors.update({draw.choice(NAMES): tensor}),
        lambda: tensors.pop(name, None),
        lambda: tensors.update({name: tensors[draw.choice(sorted(tensors))]}),
        lambda: content.update(tensors={}),
        lambda: content.update(files={}),
    )
    # One of these alone: two of them multiply, and take the memory of the machine.
    large: tuple[Callable[[], object], ...] = (
        lambda: tensor.update(boxes=tensor["boxes"] * 20000),
        lambda: tensor.update(boxes=[box | {"offsets": [i], "sizes": [1]} for i in range(30000)], shape=[30000]),
        lambda: tensors.update({f"decoder.layers.{i}.x": tensor for i in range(20000)}),
    )
    if draw.random() < 0.15:
        draw.choice(large)()
    else:
        for _ in range(draw.choice((1, 1, 2))):
            draw.choice(changes)()
    seal(checkpoint, content)


def _place(draw: Draw, checkpoint: Path) -> None:
    """Something else under the names around it."""
    folder = checkpoint.parent
    kind = draw.choice(("latest", "latest", "renamed", "file", "link", "stranger"))
    if kind == "latest":
        (folder / "latest").write_text(draw.choice(LATEST))
    elif kind == "renamed":
        checkpoint.rename(
            folder / draw.choice(("step-00000007", "step-3", "step-" + "9" * 18, "step-" + "9" * 30, "step-x"))
        )
    elif kind == "file":
        shutil.rmtree(checkpoint)
        checkpoint.write_text("no folder")
    elif kind == "link":
        shutil.rmtree(checkpoint)
        checkpoint.symlink_to(draw.choice(("../../../../beside", "step-00000003", "/etc", ".")))
    else:
        (folder / draw.choice(("step-00000004", ".step-00000004.partial", "step-00000000", "x"))).mkdir()
