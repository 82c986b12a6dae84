"""Checkpoints over several ranks: bit-for-bit resumption, damaged files, failed saves, how many are kept."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from training_runs import small_recipe, train_step, trainer_of

from megatron_sbn.errors import CheckpointError
from megatron_sbn.parallel.pieces import Piece, Pieces, join
from megatron_sbn.parallel.shard import LogicalShard
from megatron_sbn.training import checkpoint
from megatron_sbn.training.step import Trainer
from megatron_sbn.training.witness import weight_pieces

TENSOR2, PIPELINE2 = "parallel.tensor=2", "parallel.pipeline=2"
LAYOUTS = {
    "tensor2-pipeline2": (4, (TENSOR2, PIPELINE2)),
    "tensor2-data2-zero2": (4, (TENSOR2, "parallel.zero_stage=2")),
    "pipeline2-data2-tied": (4, (PIPELINE2, "model.share_embeddings_and_output_weights=true")),
    "data2-zero3": (2, ("parallel.zero_stage=3",)),
    "tensor2-data2-zero3-kept-masks": (4, (TENSOR2, "parallel.zero_stage=3", "linear.mask_interval=3")),
    "data2-zero2-offload": (2, ("parallel.zero_stage=2", "optimizer.cpu_offload=true")),
    "interleaved-kept-masks": (2, (PIPELINE2, "parallel.virtual_pipeline=2", "linear.mask_interval=3")),
    "single-dense": (1, ("linear.weight_format=dense", "linear.mask_freeze_step=1")),
}
FAST = ("optimizer.lr=3e-2", "optimizer.min_lr=1e-2")


def layout_of(trainer: Trainer) -> checkpoint.Layout:
    parallel = trainer.recipe.parallel
    return checkpoint.Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=trainer.parallel.data_size,
        virtual_pipeline=parallel.virtual_pipeline or 1,
        zero_stage=parallel.zero_stage,
    )


def save(trainer: Trainer, folder: Path, step: int, keep: int = 2) -> Path:
    stages = trainer.stages
    weights = trainer.weights()
    weights |= {f"masks.{name}": mask for name, mask in stages.state.mask_state().items()}
    snapshot = checkpoint.Snapshot(weights, trainer.zero.state_tensors())
    return checkpoint.save(folder, step, layout_of(trainer), snapshot, trainer.parallel, keep)


def resume(trainer: Trainer, folder: Path) -> int:
    step = read(trainer, folder)
    trainer.stages.state.prepare(step)
    return step


def read(trainer: Trainer, folder: Path) -> int:
    path = checkpoint.newest(folder)
    assert path is not None
    step, snapshot = checkpoint.load(path, layout_of(trainer), trainer.parallel)
    trainer.load_weights(lambda target, name: checkpoint.restore(target, snapshot.weights, name, path))
    trainer.zero.load_state_tensors(dict(snapshot.optimizer))
    trainer.stages.state.load_mask_state(checkpoint.section(snapshot.weights, "masks."), step)
    return step


def everything(trainer: Trainer) -> Pieces:
    """Copies of weights, masters, moments and codes."""
    pieces = weight_pieces(trainer)
    extra = dict(trainer.zero.state_tensors())
    for name, layer in trainer.stages.state.layers.items():
        kept = layer.prepared.codes if layer.prepared.codes is not None else layer.prepared.mask
        assert kept is not None
        extra[f"{name}.prepared"] = kept
    return pieces | {n: Piece(LogicalShard(tuple(t.shape), ()), t.detach().clone()) for n, t in extra.items()}


def different(a: Pieces, b: Pieces) -> list[str]:
    return [n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n].value, b[n].value)]


def interrupted_and_not(folder: Path, overrides: tuple[str, ...], at: int, steps: int) -> dict[str, object]:
    recipe = small_recipe((*FAST, *overrides))
    with trainer_of(recipe) as trainer:
        losses = [train_step(trainer, step).loss for step in range(at)]
        save(trainer, folder, at)
        at_save = everything(trainer)
        losses += [train_step(trainer, step).loss for step in range(at, steps)]
        at_end = everything(trainer)
    with trainer_of(recipe) as second:
        first = resume(second, folder)
        lost = different(everything(second), at_save)
        again = [train_step(second, step).loss for step in range(first, steps)]
        return {
            "first": first,
            "lost": lost,
            "drifted": different(everything(second), at_end),
            "losses": losses[at:] == again,
            "weights": weight_pieces(second),
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(layout: str, tmp_path: Path) -> None:
    world_size, overrides = LAYOUTS[layout]
    at = 2 if "masks" not in layout else 4  # between two mask updates
    ranks = run_ranks(interrupted_and_not, world_size, tmp_path, overrides, at, at + 2)
    for rank in ranks:
        assert (rank["first"], rank["lost"], rank["drifted"], rank["losses"]) == (at, [], [], True)
    join([rank["weights"] for rank in ranks])
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    parallel = small_recipe(overrides).parallel
    weights = [f"weights-t{t}-p{p}.safetensors" for t in range(parallel.tensor) for p in range(parallel.pipeline)]
    optimizers = [f"optimizer-{rank:05d}.safetensors" for rank in range(world_size)]
    assert names == sorted(["latest", "state.json", *weights, *optimizers])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(save_untrained, 2, folder, (2,), 2)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint of step 2 over two tensor ranks, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def save_untrained(folder: Path, steps: tuple[int, ...], keep: int) -> None:
    with trainer_of(small_recipe((TENSOR2, "model.num_layers=1"))) as trainer:
        for step in steps:
            save(trainer, folder, step, keep)


def refusals(folder: Path, overrides: tuple[str, ...]) -> list[str]:
    """What reading each of the folders in `folder` says on this rank; nothing where all is well."""
    messages = []
    with trainer_of(small_recipe(overrides)) as trainer:
        for path in sorted(folder.iterdir()):
            try:
                read(trainer, path)
                messages.append("")
            except CheckpointError as error:
                messages.append(str(error))
    return messages


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "state-missing": lambda step: (step / "state.json").unlink(),
    "state-torn": lambda step: truncate(step / "state.json"),
    "state-binary": lambda step: (step / "state.json").write_bytes(b"\xff\xfe\x00"),
    "state-list": lambda step: (step / "state.json").write_text("[1, 2]"),
    "state-nested": lambda step: (step / "state.json").write_text("[" * 100_000),
    "state-other-keys": lambda step: (step / "state.json").write_text('{"step": 2, "layout": {"tensor": 2}}'),
    "weights-missing": lambda step: (step / "weights-t0-p0.safetensors").unlink(),
    "weights-torn": lambda step: truncate(step / "weights-t0-p0.safetensors"),
    "optimizer-garbage": lambda step: (step / "optimizer-00000.safetensors").write_bytes(b"garbage" * 100),
    "optimizer-empty": lambda step: (step / "optimizer-00000.safetensors").write_bytes(b""),
    "pointer-dangling": lambda step: (step.parent / "latest").write_text("step-00000009\n"),
    "pointer-escapes": lambda step: (step.parent / "latest").write_text("../saved/step-00000002\n"),
    "pointer-empty": lambda step: (step.parent / "latest").write_text(""),
    "pointer-binary": lambda step: (step.parent / "latest").write_bytes(b"\xff\xff"),
}


def test_damaged_files_are_named(saved: Path, tmp_path: Path) -> None:
    blamed = {"weights": "weights-t0-p0.safetensors", "optimizer": "optimizer-00000.safetensors", "pointer": "latest"}
    for name, damage in DAMAGE.items():
        shutil.copytree(saved, tmp_path / name)
        damage(tmp_path / name / "step-00000002")
    ranks = run_ranks(refusals, 2, tmp_path, (TENSOR2, "model.num_layers=1"))
    for name, message, other in zip(sorted(DAMAGE), *ranks, strict=True):
        kind = name.partition("-")[0]
        # A folder without its state is no checkpoint, and the pointer to it is wrong.
        file = "latest" if name == "state-missing" else blamed.get(kind, "step-00000002/state.json")
        assert message.startswith(f"{tmp_path / name}/"), message
        assert file in message
        assert "\n" not in message
        if kind in ("weights", "optimizer"):
            assert other.endswith("step-00000002: cannot be read by another rank, see its message")
        else:
            assert other == message


def test_another_layout_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "other")
    for overrides in ((TENSOR2, "parallel.zero_stage=2"), (PIPELINE2, "model.num_layers=2"), ()):
        for message in run_ranks(refusals, 2, tmp_path, ("model.num_layers=1", *overrides)):
            assert "was saved at parallel.tensor=2 parallel.pipeline=1" in message[0]
            assert "resume at the saved layout" in message[0]


def test_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "other")
    for overrides, told in (
        ("model.num_layers=2", "decoder.layers.1.input_layernorm.weight has no tensor, this recipe needs [64]"),
        ("model.ffn_hidden_size=128", "decoder.layers.0.mlp.linear_fc1.weight has shape [96, 64]"),
    ):
        ((message,), _) = run_ranks(refusals, 2, tmp_path, (TENSOR2, "model.num_layers=1", overrides))
        assert told in message
        assert "step-00000002" in message


@pytest.mark.parametrize(
    ("steps", "keep", "left"),
    [
        ((10, 20, 30, 40), 2, [30, 40]),
        ((10, 20, 30), 1, [30]),
        ((10, 20), 5, [10, 20]),
        ((10, 20, 20), 2, [10, 20]),
        ((30, 40, 20), 2, [20, 40]),  # went back to step 10 and continued from there
        ((30, 40, 20), 1, [20]),
    ],
    ids=str,
)
def test_the_newest_are_kept_and_the_last_saved_always(
    steps: tuple[int, ...], keep: int, left: list[int], tmp_path: Path
) -> None:
    run_ranks(save_untrained, 2, tmp_path, steps, keep)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *(f"step-{s:08d}" for s in left)]
    newest = checkpoint.newest(tmp_path)
    assert newest == tmp_path / f"step-{steps[-1]:08d}"
    assert json.loads((newest / "state.json").read_text())["step"] == steps[-1]


@pytest.mark.parametrize(
    ("bad_rank", "where"), [(1, "save_file"), (0, "save_file"), (0, "_make_empty"), (1, "flush_to_disk")]
)
def test_one_rank_that_cannot_write_fails_all_and_leaves_nothing(folder: Path, bad_rank: int, where: str) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    messages = run_ranks(fail_then_look, 2, folder, bad_rank, where)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    for rank, (message, again) in enumerate(messages):
        assert f"step-00000003: cannot be saved on rank {rank}" in message
        assert ("No space left on device" in message) == (rank == bad_rank)
        assert again == "step-00000002"
    assert not list(folder.glob(".*"))


def fail_then_look(folder: Path, bad_rank: int, where: str) -> tuple[str, str]:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with trainer_of(small_recipe((TENSOR2, "model.num_layers=1"))) as trainer:
        bad = trainer.parallel.rank == bad_rank
        fails = mock.patch.object(checkpoint, where, full_disk) if bad else mock.MagicMock()
        with fails, pytest.raises(CheckpointError) as refusal:
            save(trainer, folder, 3)
    newest = checkpoint.newest(folder)
    assert newest is not None
    return str(refusal.value), newest.name
