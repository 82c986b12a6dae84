"""What a start does with checkpoints that are damaged, of another model or of other data, over two ranks."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import run_ranks
from saving import Run
from training_runs import small_recipe, trainer_of

from megatron_sbn.errors import CheckpointError

TENSOR2, ONE_LAYER = "parallel.tensor=2", "model.num_layers=1"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(save_three, 2, folder)
    return folder


def save_three(folder: Path) -> None:
    with trainer_of(small_recipe((TENSOR2, ONE_LAYER, "checkpoint.keep=3"))) as trainer:
        run = Run(trainer, folder)
        for step in (2, 3, 4):
            run.save(step)


def opened(folders: list[Path], overrides: tuple[str, ...]) -> list[tuple[int, str]]:
    """For each run: the step that was restored and what was said, or -1 and the refusal."""
    results = []
    with trainer_of(small_recipe((ONE_LAYER, *overrides))) as trainer:
        for folder in folders:
            run = Run(trainer, folder)
            try:
                results.append((run.restore(), "\n".join(run.said)))
            except CheckpointError as error:
                results.append((-1 if error.on_every_rank else -2, str(error)))
    return results


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def every(folder: Path, damage: Callable[[Path], None]) -> None:
    for path in folder.glob("step-*"):
        damage(path / "shard-00001-0.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "nothing": (lambda f: None, 4, ""),
    "a torn file": (
        lambda f: truncate(f / "step-00000004/shard-00000-0.safetensors"),
        3,
        "00000-0.safetensors: has",
    ),
    "a bit of another rank's": (lambda f: flip(f / "step-00000004/shard-00001-0.safetensors"), 3, "SHA-256 differs"),
    "a missing manifest": (lambda f: (f / "step-00000004/manifest.json").unlink(), 3, "manifest.json: cannot"),
    "the state": (lambda f: truncate(f / "step-00000004/state.json"), 3, "state.json: has"),
    "two of three": (
        lambda f: [flip(f / f"step-0000000{s}/manifest.json") for s in (3, 4)],
        2,
        "00003/manifest",
    ),
    "no pointer": (lambda f: (f / "latest").unlink(), 4, ""),
    "a pointer to nothing": (lambda f: (f / "latest").write_text("step-00000009"), 4, ""),
    "an older one in force": (lambda f: (f / "latest").write_text("step-00000003"), 3, ""),
    "all": (lambda f: every(f, truncate), -1, "no checkpoint is valid: "),
    "all gone": (lambda f: [shutil.rmtree(p) for p in f.glob("step-*")], -1, "latest names what is not there"),
}


def test_the_newest_whole_one_is_used_and_the_others_are_named(saved: Path, tmp_path: Path) -> None:
    for name, (damage, _, _) in DAMAGE.items():
        shutil.copytree(saved, tmp_path / name)
        damage(tmp_path / name / "checkpoints")
    ranks = run_ranks(opened, 2, [tmp_path / name for name in DAMAGE], (TENSOR2,))
    assert ranks[0] == ranks[1]
    for (name, (_, step, expected)), (found, said) in zip(DAMAGE.items(), ranks[0], strict=True):
        assert found == step, (name, said)
        assert expected in said
        assert bool(said) == bool(expected), name
        if step > 0 and expected:
            assert said.splitlines()[-1].endswith("the one before it is used")
            assert len(said.splitlines()) == 4 - step


def test_another_model_or_other_data_is_refused(saved: Path) -> None:
    for overrides, expected in (
        (("model.num_layers=2",), "decoder.layers.1.input_layernorm.weight has no tensor, this recipe needs [64]"),
        (("model.ffn_hidden_size=128",), "decoder.layers.0.mlp.linear_fc1.weight has shape [192, 64]"),
        (("model.share_embeddings_and_output_weights=true",), "holds output_layer.weight, which this model lacks"),
        (("training.seed=7",), "training.seed was 1234 and is 7"),
        (("training.global_batch_size=8",), "training.global_batch_size was 4 and is 8"),
        (("model.seq_length=16",), "model.seq_length was 32 and is 16"),
    ):
        for ((step, message),) in run_ranks(opened, 2, [saved], overrides):
            assert step == -1
            assert expected in message
            assert "step-00000004" in message
            assert "\n" not in message
