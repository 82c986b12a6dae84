"""The folder of checkpoints: which is tried, what is found wrong with one, what is removed and when."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_sbn.checkpoint import directory as folders
from megatron_sbn.checkpoint.manifest import (
    MANIFEST,
    STATE,
    DataPosition,
    Layout,
    State,
    manifest_text,
    read_manifest,
    read_state,
    state_text,
)
from megatron_sbn.checkpoint.regions import Region
from megatron_sbn.checkpoint.shards import Chunk, Written, describe, merge, write_chunks
from megatron_sbn.cli import main
from megatron_sbn.errors import CheckpointError

SHARD = "shard-00000-0.safetensors"


def made(folder: Path, step: int, after: int | None = None) -> Path:
    """A whole checkpoint of two small tensors, published as the saver does."""
    path = folders.begin(folder, step)
    chunks = [Chunk("a.weight", (4, 3), Region((0, 0), (4, 3)), torch.full((4, 3), float(step)))]
    chunks.append(Chunk("optimizer.exp_avg.a.weight", (4, 3), Region((0, 0), (4, 3)), torch.zeros(4, 3)))
    written = write_chunks(path, 0, chunks)
    state = State(
        step=step,
        layout=Layout(tensor=2, pipeline=2, data=3, zero_stage=1),
        data=DataPosition(batches=step, seed=1, global_batch_size=12, seq_length=32),
        optimizer_steps=step,
        version="0",
    )
    (path / STATE).write_bytes(state_text(state))
    own = Written({STATE: describe(path / STATE)}, {})
    (path / MANIFEST).write_bytes(manifest_text(merge([own, written])))
    return folders.publish(folder, step, after)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """checkpoints/ with steps 10, 20 and 30."""
    for step in (10, 20, 30):
        made(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


def steps(paths: list[Path]) -> list[int | None]:
    return [folders.step_of(path) for path in paths]


def test_the_one_in_force_is_tried_first_then_those_before_it(folder: Path) -> None:
    assert steps(folders.candidates(folder)) == [30, 20, 10]
    (folder / "latest").write_text("step-00000020\n")
    assert steps(folders.candidates(folder)) == [20, 10]  # 30 is of a run that was given up
    assert folders.newest(folder) == folder / "step-00000020"
    shutil.rmtree(folder / "step-00000020")
    assert steps(folders.candidates(folder)) == [10]


@pytest.mark.parametrize("pointer", [None, b"", b"\xff\xfe", b"../step-00000030", b"step-", b"/etc/passwd", b"s/.."])
def test_a_pointer_that_names_no_checkpoint_is_not_followed(folder: Path, pointer: bytes | None) -> None:
    (folder / "latest").unlink()
    if pointer is not None:
        (folder / "latest").write_bytes(pointer)
    assert steps(folders.candidates(folder)) == [30, 20, 10]
    assert folders.holds_any(folder)


@pytest.mark.parametrize(
    "name", ["step-", "step--1", "step-" + "9" * 5000, "step-\u0663", "step-1x", "latest", "step-+1"]
)
def test_what_is_no_name_of_a_checkpoint(name: str) -> None:
    assert folders.step_of(Path(name)) is None


def test_a_folder_without_checkpoints(tmp_path: Path) -> None:
    assert folders.candidates(tmp_path / "none") == []
    assert not folders.holds_any(tmp_path / "none")
    (tmp_path / ".step-00000001.partial").mkdir()
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-00000002").write_text("a file")
    assert not folders.holds_any(tmp_path)
    (tmp_path / "latest").write_text("step-00000001")
    assert folders.holds_any(tmp_path)  # something was saved here, and is gone


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict], None]) -> None:
    """Changes a manifest and gives it the checksum of its new content."""
    content = json.loads((path / MANIFEST).read_text())["content"]
    change(content)
    from megatron_sbn.checkpoint.manifest import _digest

    (path / MANIFEST).write_text(json.dumps({"sha256": _digest(content), "content": content}))


def rename_file(content: dict, name: str) -> None:
    content["files"][name] = content["files"].pop(SHARD)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "torn tensors": (lambda p: truncate(p / SHARD), f"{SHARD}: has "),
    "a bit of the tensors": (lambda p: flip(p / SHARD), f"{SHARD}: its content is not what was saved"),
    "a bit of their header": (lambda p: flip(p / SHARD, 20), f"{SHARD}: its content is not what was saved"),
    "no tensors": (lambda p: (p / SHARD).unlink(), f"{SHARD}: cannot be read: No such file"),
    "tensors are a folder": (lambda p: ((p / SHARD).unlink(), (p / SHARD).mkdir()), SHARD),
    "a bit of the state": (lambda p: flip(p / STATE, 12), f"{STATE}: its content is not what was saved"),
    "no state": (lambda p: (p / STATE).unlink(), f"{STATE}: cannot be read"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), f"{MANIFEST}: cannot be read: No such file"),
    "torn manifest": (lambda p: truncate(p / MANIFEST), f"{MANIFEST}: is not JSON"),
    "a bit of the manifest": (lambda p: flip(p / MANIFEST, 90), MANIFEST),
    "empty manifest": (lambda p: (p / MANIFEST).write_text(""), f"{MANIFEST}: is not JSON"),
    "binary manifest": (lambda p: (p / MANIFEST).write_bytes(b"\xff\xfe\x00"), f"{MANIFEST}: is not JSON"),
    "nested manifest": (lambda p: (p / MANIFEST).write_text("[" * 100_000), f"{MANIFEST}: is not JSON"),
    "manifest is a list": (lambda p: (p / MANIFEST).write_text("[1]"), f"{MANIFEST}: has no checksum"),
    "path trick": (lambda p: edit(p, lambda c: rename_file(c, "../../secret")), "is no name of a checkpoint's file"),
    "absolute path": (lambda p: edit(p, lambda c: rename_file(c, "/etc/passwd")), "is no name of a checkpoint's file"),
    "unlisted file": (lambda p: edit(p, lambda c: rename_file(c, "shard-00007-0.safetensors")), "not among the files"),
    "negative size": (lambda p: edit(p, lambda c: c["files"][SHARD].update(bytes=-1)), f"{MANIFEST}: files."),
    "wrong kind": (lambda p: edit(p, lambda c: c.update(tensors=3)), f"{MANIFEST}: tensors"),
    "another format": (lambda p: edit(p, lambda c: c.update(format=9)), f"{MANIFEST}: format"),
    "unknown key": (lambda p: edit(p, lambda c: c.update(extra=1)), f"{MANIFEST}: extra"),
    "no state listed": (lambda p: edit(p, lambda c: c["files"].pop(STATE)), f"{STATE} is not among the files"),
    "a false name": (lambda p: p.rename(p.with_name("step-00000031")), "holds step 30; give it its own name back"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_named(folder: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    action, expected = DAMAGE[damage]
    path = folder / "step-00000030"
    folders.verify(path)
    action(path)
    path = folders.saved(folder)[0]
    with pytest.raises(CheckpointError) as refusal:
        folders.verify(path)
    assert expected in str(refusal.value)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)
    assert main(["checkpoint", "verify", str(path)]) == 4
    assert expected in capsys.readouterr().err


def test_a_manifest_is_read_as_it_was_written(folder: Path) -> None:
    manifest = read_manifest(folder / "step-00000030")
    assert manifest_text(manifest) == (folder / "step-00000030" / MANIFEST).read_bytes()
    assert manifest.bytes == sum(
        (folder / "step-00000030" / name).stat().st_size for name in manifest.files if name != MANIFEST
    )


@pytest.mark.parametrize("key", ["masks", "telemetry"])
@pytest.mark.parametrize("group", [0, -1, 33])
def test_groups_of_masks_that_cannot_be_are_named(folder: Path, key: str, group: int) -> None:
    path = folder / "step-00000030"
    value = [1, group] if key == "masks" else {"step": 1, "flips": 0, "sparsity": [1, group]}
    (path / STATE).write_text(json.dumps(json.loads((path / STATE).read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=rf"{STATE}: {key}.*1: Input should be (greater|less) than or equal to"):
        read_state(path)


def test_what_killed_runs_left_is_removed(folder: Path) -> None:
    for name in (".step-00000040.partial", ".step-00000005.removed"):
        (folder / name).mkdir()
        (folder / name / SHARD).write_text("half")
    (folder / ".latest.partial").write_text("step-")
    made(folder, 40)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", *(f"step-000000{s}" for s in (10, 20, 30, 40))]


def test_what_was_given_up_does_not_count_among_the_newest(folder: Path) -> None:
    (folder / "latest").write_text("step-00000010\n")
    made(folder, 12, after=10)
    folders.prune(folder, 3, 0)
    assert steps(folders.saved(folder)) == [30, 12, 10]
    folders.prune(folder, 2, 0)
    assert steps(folders.saved(folder)) == [12, 10]


def test_what_was_given_up_is_not_tried_when_a_run_has_passed_it(folder: Path) -> None:
    (folder / "latest").write_text("step-00000010\n")
    made(folder, 25, after=10)
    assert steps(folders.candidates(folder)) == [25, 10]
    assert steps(folders.saved(folder)) == [30, 25, 10]


def test_a_removal_that_is_cut_short_leaves_no_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folders.prune(folder, 1, 0)
    assert steps(folders.candidates(folder)) == [30, 10]
    assert (folder / ".step-00000020.removed").is_dir()


def test_show_and_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "show", str(folder / "step-00000020")]) == 0
    shown = capsys.readouterr().out
    assert "step 20" in shown
    assert "tensor 2 x pipeline 2 x data 3, ZeRO-1, 12 ranks" in shown
    assert "not verified" in shown
    assert "a.weight" not in shown
    assert main(["checkpoint", "show", str(folder / "step-00000020"), "--tensors"]) == 0
    assert "optimizer.exp_avg.a.weight  F32   4 x 3" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(folder / "step-00000020")]) == 0
    assert "valid" in capsys.readouterr().out


def test_a_run_is_shown_and_verified_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's folder, or its checkpoints: every one, the one in force marked."""
    flip(folder / "step-00000010" / SHARD)
    assert main(["checkpoint", "show", str(folder.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("step-")] == [f"step-000000{s}" for s in (30, 20, 10)]
    assert ["in force" in line for line in lines if line.startswith("step-")] == [True, False, False]
    assert main(["checkpoint", "verify", str(folder.parent)]) == 4
    expected = capsys.readouterr()
    assert expected.out.count("valid") == 2
    assert f"step-00000010/{SHARD}: its content" in expected.err
    assert main(["checkpoint", "show", str(folder / "nothing")]) == 4
    assert "no checkpoint" in capsys.readouterr().err
