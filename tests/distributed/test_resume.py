"""Checkpoints over several ranks at one layout: bit-for-bit resumption, failed saves, how many are kept."""

import json
import resource
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from cases import cases
from ranks import run_ranks
from saving import FAST, Run, derived, whole_state
from training_runs import small_recipe, trainer_of

from megatron_sbn.checkpoint import directory as folders
from megatron_sbn.checkpoint import saver, shards
from megatron_sbn.checkpoint.directory import newest, verify
from megatron_sbn.doctor.logical_tensors import assemble
from megatron_sbn.errors import CheckpointError

TENSOR2, PIPELINE2 = "parallel.tensor=2", "parallel.pipeline=2"
QUICK = ("tensor2-pipeline2", "data2-zero3", "interleaved-kept-masks", "single-dense-synchronous")
LAYOUTS = {
    "tensor2-pipeline2": (4, (TENSOR2, PIPELINE2)),
    "tensor2-data2-zero2": (4, (TENSOR2, "parallel.zero_stage=2")),
    "pipeline2-data2-tied": (4, (PIPELINE2, "model.share_embeddings_and_output_weights=true")),
    "data2-zero3": (2, ("parallel.zero_stage=3",)),
    "tensor2-data2-zero3-kept-masks": (4, (TENSOR2, "parallel.zero_stage=3", "linear.mask_interval=3")),
    "data2-zero2-offload": (2, ("parallel.zero_stage=2", "optimizer.cpu_offload=true")),
    "interleaved-kept-masks": (2, (PIPELINE2, "parallel.virtual_pipeline=2", "linear.mask_interval=3")),
    "single-dense-synchronous": (
        1,
        ("linear.weight_format=dense", "linear.mask_freeze_step=1", "checkpoint.asynchronous=false"),
    ),
}


def interrupted_and_not(folder: Path, overrides: tuple[str, ...], at: int, steps: int) -> dict[str, object]:
    recipe = small_recipe((*FAST, *overrides))
    with trainer_of(recipe) as trainer:
        run = Run(trainer, folder)
        run.train(0, at)
        run.checkpoints.save(at, at, None)
        at_save = whole_state(trainer), derived(trainer, run.telemetry), run.telemetry.counters()
        losses = run.train(at, steps)  # while it is written
        run.checkpoints.saver.finish()
        at_end = whole_state(trainer), derived(trainer, run.telemetry), run.telemetry.counters()
    with trainer_of(recipe) as second:
        run = Run(second, folder)
        first = run.restore()
        lost = different(run, at_save)
        again = run.train(first, steps)
        return {
            "first": first,
            "lost": lost,
            "drifted": different(run, at_end),
            "losses": losses == again,
            "shards": whole_state(second),
        }


def different(run: Run, before: tuple) -> list[str]:
    """Names of what is not bit for bit as before."""
    shards, made, counters = before
    now = {name: part.value for name, part in whole_state(run.trainer).items()} | derived(run.trainer, run.telemetry)
    then = {name: part.value for name, part in shards.items()} | made
    wrong = [n for n in now.keys() | then.keys() if n not in now or n not in then or not torch.equal(now[n], then[n])]
    return wrong if counters == run.telemetry.counters() else [*wrong, "counters"]


@pytest.mark.parametrize("layout", cases(LAYOUTS, QUICK))
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(layout: str, tmp_path: Path) -> None:
    world_size, overrides = LAYOUTS[layout]
    at = 2 if "masks" not in layout else 4  # between two mask updates
    ranks = run_ranks(interrupted_and_not, world_size, tmp_path, overrides, at, at + 2)
    for rank in ranks:
        assert (rank["first"], rank["lost"], rank["drifted"], rank["losses"]) == (at, [], [], True)
    assemble([rank["shards"] for rank in ranks])
    path = newest(tmp_path / "checkpoints")
    assert path is not None
    manifest = verify(path)
    assert {file.name for file in path.iterdir()} == {"manifest.json", *manifest.files}
    masks = [name for name in manifest.tensors if name.startswith("masks.")]
    assert bool(masks) == ("masks" in layout or "dense" in layout)
    assert not any("gamma" in name or "codes" in name for name in manifest.tensors)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(save_untrained, 2, folder, (2,))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A run with a checkpoint of step 2 over two tensor ranks."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def save_untrained(folder: Path, steps: tuple[int, ...], *overrides: str) -> None:
    with trainer_of(small_recipe((TENSOR2, "model.num_layers=1", *overrides))) as trainer:
        run = Run(trainer, folder)
        for step in steps:
            run.save(step)


@pytest.mark.parametrize(
    ("steps", "overrides", "left"),
    [
        ((10, 20, 30, 40), (), [30, 40]),
        ((10, 20, 30), ("checkpoint.keep=1",), [30]),
        ((10, 20), ("checkpoint.keep=5",), [10, 20]),
        ((10, 20, 20), (), [10, 20]),
        ((30, 40, 20), (), [20, 40]),  # went back to step 10 and continued from there
        ((30, 40, 20), ("checkpoint.keep=1",), [20]),
        ((10, 20, 30, 40, 50, 60), ("checkpoint.keep=1", "checkpoint.keep_every=20"), [20, 40, 60]),
    ],
    ids=str,
)
def test_the_newest_are_kept_and_the_last_saved_always(
    steps: tuple[int, ...], overrides: tuple[str, ...], left: list[int], tmp_path: Path
) -> None:
    run_ranks(save_untrained, 2, tmp_path, steps, *overrides)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", *(f"step-{s:08d}" for s in left)]
    path = newest(tmp_path / "checkpoints")
    assert path is not None
    assert path.name == f"step-{steps[-1]:08d}"
    assert json.loads((path / "state.json").read_text())["step"] == steps[-1]


FAILURES = {
    "no room for the folder": (0, folders, "begin"),
    "second rank's tensors": (1, shards, "save_file"),
    "first rank's tensors": (0, shards, "save_file"),
    "second rank's flush": (1, shards, "flush_to_disk"),
    "the manifest": (0, saver, "manifest_text"),
    "the rename": (0, folders, "publish"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_one_rank_that_cannot_write_fails_all_and_leaves_nothing(folder: Path, failure: str) -> None:
    bad_rank, module, where = FAILURES[failure]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ranks = run_ranks(fail_then_save, 2, folder, bad_rank, module.__name__, where)
    for message, went_on, left in ranks:
        assert "checkpoints/step-00000003: cannot be saved:" in message
        assert f"rank {bad_rank}: " in message
        assert "No space left on device" in message
        assert "the older ones are as they were" in message
        assert "\n" not in message
        assert "training goes on" in went_on
        assert left == before
    assert newest(folder / "checkpoints") == folder / "checkpoints" / "step-00000005"
    verify(folder / "checkpoints" / "step-00000005")


def fail_then_save(folder: Path, bad_rank: int, module: str, where: str) -> tuple[str, str, dict[Path, bytes]]:
    """What a failing save says where runs stop, what it says where they go on; then one that succeeds."""

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with trainer_of(small_recipe((TENSOR2, "model.num_layers=1"))) as trainer:
        run = Run(trainer, folder)
        bad = trainer.parallel.rank == bad_rank
        with mock.patch(f"{module}.{where}", full_disk) if bad else mock.MagicMock():
            with pytest.raises(CheckpointError) as refusal:
                run.save(3)
            settings = trainer.recipe.checkpoint.model_copy(update={"on_failure": "continue"})
            run.checkpoints.saver.settings = settings
            run.save(4)
        torch.distributed.barrier()
        left = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        torch.distributed.barrier()
        run.save(5)
    return str(refusal.value), run.said[0], left


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(folder: Path) -> None:
    ((message, _, left), _) = run_ranks(full_before, 2, folder)
    assert "it takes 0.18 MiB, and 0.00 MiB are free" in message
    assert left == ["latest", "step-00000002"]


def full_before(folder: Path) -> tuple[str, list[str], list[str]]:
    with trainer_of(small_recipe((TENSOR2, "model.num_layers=1"))) as trainer:
        run = Run(trainer, folder)
        small = mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1000))
        with small, pytest.raises(CheckpointError) as refusal:
            run.save(3)
        return str(refusal.value), run.said, sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_file_that_the_system_cuts_off_fails_the_save(folder: Path) -> None:
    """No fake: the kernel refuses to let a file of rank 1 grow, as on a full disk or beyond a quota."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for message, left, again in run_ranks(limited_then_not, 2, folder):
        assert "step-00000003: cannot be saved: rank 1: " in message
        assert "File too large" in message
        assert left == before
        assert again == "step-00000003"


def limited_then_not(folder: Path) -> tuple[str, dict[Path, bytes], str]:
    with trainer_of(small_recipe((TENSOR2, "model.num_layers=1"))) as trainer:
        run = Run(trainer, folder)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if trainer.parallel.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(CheckpointError) as refusal:
            run.save(3)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        torch.distributed.barrier()
        left = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        torch.distributed.barrier()
        run.save(3)
    path = newest(folder / "checkpoints")
    assert path is not None
    verify(path)
    return str(refusal.value), left, path.name
