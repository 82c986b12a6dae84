"""A run that begins from another's checkpoint: everything continues that run, weights begin a new one."""

from pathlib import Path

import pytest
import torch
from cases import cases
from ranks import run_ranks
from saving import FAST, Run, whole_state
from training_runs import small_recipe, trainer_of

from megatron_sbn.checkpoint.average import average
from megatron_sbn.cli import main
from megatron_sbn.doctor.logical_tensors import assemble
from megatron_sbn.errors import CheckpointError, InputError

LAYOUTS = {
    "tensor2": (2, ("parallel.tensor=2",)),
    "data2-zero3": (2, ("parallel.zero_stage=3",)),
    "single": (1, ()),
}


def saved(folder: Path, overrides: tuple[str, ...]) -> list[float]:
    """A run with checkpoints at steps 1 and 2; the losses of the two steps after them."""
    with trainer_of(small_recipe((*FAST, *overrides))) as trainer:
        run = Run(trainer, folder)
        run.train(0, 1)
        run.save(1)
        run.train(1, 2)
        run.save(2)
        return run.train(2, 4)


def branched(folder: Path, source: str, weights_only: bool, overrides: tuple[str, ...]) -> tuple[int, list, object]:
    with trainer_of(small_recipe((*FAST, *overrides))) as trainer:
        run = Run(trainer, folder)
        state = run.checkpoints.branch(source, weights_only)
        taken = whole_state(trainer)
        first = 0 if weights_only else state.step
        return trainer.zero.updates, run.train(first, first + 2), taken


@pytest.mark.parametrize("layout", cases(LAYOUTS, ("tensor2", "single")))
def test_everything_goes_on_and_weights_begin_anew(layout: str, tmp_path: Path) -> None:
    world, overrides = LAYOUTS[layout]
    losses, *_ = run_ranks(saved, world, tmp_path / "first", overrides)
    ranks = run_ranks(branched, world, tmp_path / "second", str(tmp_path / "first"), False, overrides)
    for updates, again, _ in ranks:
        assert (updates, again) == (2, losses)
    assert not (tmp_path / "second" / "checkpoints" / "latest").exists()  # what is its own begins with its first save
    weights = run_ranks(branched, world, tmp_path / "third", f"{tmp_path / 'first'}@2", True, overrides)
    whole, alone = (assemble([taken for _, _, taken in found]) for found in (ranks, weights))
    for updates, again, _ in weights:
        assert updates == 0
        assert again != losses
    for name, value in alone.items():
        assert torch.equal(value, whole[name]), name


def test_an_average_of_checkpoints_is_a_checkpoint_to_start_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_ranks(saved, 2, tmp_path / "first", LAYOUTS["tensor2"][1])
    sources = [f"{tmp_path / 'first'}@{step}" for step in (1, 2)]
    assert main(["checkpoint", "average", *sources, "--output", str(tmp_path / "mean")]) == 0
    assert main(["checkpoint", "verify", str(tmp_path / "mean")]) == 0
    assert "valid" in capsys.readouterr().out
    one, two, mean = (
        assemble([taken for _, _, taken in run_ranks(branched, 1, tmp_path / "x", source, True, ())])
        for source in (*sources, str(tmp_path / "mean"))
    )
    for name, value in mean.items():
        assert torch.equal(value, ((one[name].double() + two[name].double()) / 2).float()), name
    assert any(not torch.equal(one[name], two[name]) for name in mean)
    with pytest.raises(InputError, match="exists already"):
        average(sources, tmp_path / "mean")
    with pytest.raises(CheckpointError, match=r"first@7: there is no checkpoint of step 7; there are 1, 2"):
        average([sources[0], f"{tmp_path / 'first'}@7"], tmp_path / "other")
    assert not list(tmp_path.glob("*other*"))
