"""Bad steps in a run: refused without a trace, skipped, or answered by going back; within a budget."""

import random
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from cases import cases
from ranks import run_ranks
from saving import FAST, whole_state
from training_runs import small_recipe, train_step, trainer_of

from megatron_sbn.data.corpus import PrepareOptions, prepare
from megatron_sbn.errors import SbnError
from megatron_sbn.launch.stop_signals import StopSignals
from megatron_sbn.runs.metrics_file import read_metrics
from megatron_sbn.runs.status import read_status
from megatron_sbn.training import loop
from megatron_sbn.training.bad_steps import BadStepError
from megatron_sbn.training.step import Trainer

TENSOR2, PIPELINE2, ZERO2, ZERO3 = (
    "parallel.tensor=2",
    "parallel.pipeline=2",
    "parallel.zero_stage=2",
    "parallel.zero_stage=3",
)
EXPERTS = ("model.num_moe_experts=4", "model.moe_ffn_hidden_size=48", "model.num_layers=2", "parallel.expert=2")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "tensor2-pipeline2": (4, (TENSOR2, PIPELINE2)),
    "data2-zero2": (2, (ZERO2,)),
    "data2-zero2-offload": (2, (ZERO2, "optimizer.cpu_offload=true")),
    "tensor2-data2-zero3": (4, (TENSOR2, ZERO3)),
    "expert2-zero2": (2, (*EXPERTS, ZERO2)),
}


def refused_then_made(overrides: tuple[str, ...]) -> tuple[list[str], bool, bool]:
    """What a third step says that is refused for its loss, and then for its norm; whether that left a trace; whether
    the next step is that of a run without them.
    """
    recipe = small_recipe((*FAST, *overrides))
    with trainer_of(recipe) as trainer:
        for step in (0, 1):
            train_step(trainer, step)
        before, said, untouched = whole_state(trainer), [], True
        for why in ("loss", "norm"):
            verdict = mock.patch.object(trainer.judge, why, return_value=f"its {why} is a test")
            with verdict, pytest.raises(BadStepError) as refusal:
                train_step(trainer, 7)  # another batch
            said.append(str(refusal.value))
            after = whole_state(trainer)
            untouched &= all(torch.equal(before[name].value, piece.value) for name, piece in after.items())
        train_step(trainer, 2)
        made = whole_state(trainer)
    with trainer_of(recipe) as other:
        for step in (0, 1, 2):
            train_step(other, step)
        same = all(torch.equal(made[name].value, piece.value) for name, piece in whole_state(other).items())
    return said, untouched, same


@pytest.mark.parametrize("layout", cases(LAYOUTS, ["one rank", "tensor2-pipeline2", "data2-zero2-offload"]))
def test_a_refused_step_leaves_no_trace(layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    for said, untouched, same in run_ranks(refused_then_made, world_size, overrides):
        for why, message in zip(("loss", "norm"), said, strict=True):
            assert message.startswith(f"step 8: its {why} is a test; the checkpoints are as they were")
        assert untouched
        assert same


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("\n".join(f"{i} words of line {i * i} are here" for i in range(3000)))
    prepare(PrepareOptions(inputs=(str(folder / "text.txt"),), output=folder / "own", vocab_size=300), workers=1)
    return folder / "own"


def trained(
    shard: Path, folder: Path, bad_batches: tuple[int, ...], overrides: tuple[str, ...], late_at: int = -1
) -> tuple[str, dict]:
    """Trains 12 steps, whose batches in `bad_batches` have a loss of NaN; how it ended, and the losses by batch."""
    own = (f"data.train={shard}", f"run_dir={folder}", "model.num_layers=1", "model.vocab_size=300")
    short = ("training.steps=12", "checkpoint.interval=4", "training.telemetry_interval=3", "tracking.enabled=false")
    recipe = small_recipe((*own, *short, *overrides))
    losses: dict[int, float] = {}
    signals = StopSignals()
    real, seen = Trainer._mean_loss, loop.batch

    def noted(dataset: object, number: int, *rest: object, **more: object) -> object:
        losses[number] = 0.0
        if number == late_at:
            signals.since -= 1000.0
        return seen(dataset, number, *rest, **more)

    def poisoned(self: Trainer, found: list) -> float:
        number = max(losses)
        losses[number] = float("nan") if number in bad_batches else real(self, found)
        return losses[number]

    with mock.patch.object(loop, "batch", noted), mock.patch.object(Trainer, "_mean_loss", poisoned):
        try:
            ended = str(loop.run(recipe, signals))
        except SbnError as error:
            ended = f"{type(error).__name__}: {error}"
    return ended, losses


def steps_and_losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line}


def test_skipping_goes_on_with_the_next_batch(shard: Path, tmp_path: Path) -> None:
    """The same losses as a run that never saw the bad batches."""
    skip = ("training.on_bad_step=skip",)
    ((ended, losses),) = run_ranks(trained, 1, shard, tmp_path / "run", (2, 3, 9), skip)
    assert ended == "0"
    assert list(losses) == list(range(15))
    good = {batch: loss for batch, loss in losses.items() if batch not in (2, 3, 9)}
    assert list(steps_and_losses(tmp_path / "run").values()) == list(good.values())
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "step 3: loss is nan; batch 3 is given up (bad step 1 of 10 allowed)" in log
    last = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "skipped_batches" in line][-1]
    assert (last["step"], last["skipped_batches"]) == (12, 3)
    # The data position is part of the checkpoint: stopped at the third bad batch and resumed, the same batches follow.
    halfway = tmp_path / "halfway"
    ((ended, _),) = run_ranks(trained, 1, shard, halfway, (2, 3, 9), (*skip, "training.bad_step_budget=2"))
    assert "is used up" in ended
    ((ended, rest),) = run_ranks(trained, 1, shard, halfway, (2, 3, 9), skip)
    assert list(rest) == list(range(6, 15))
    assert steps_and_losses(halfway) == steps_and_losses(tmp_path / "run")


def test_rolling_back_goes_on_from_a_checkpoint_after_the_bad_batch(shard: Path, tmp_path: Path) -> None:
    rollback = ("training.on_bad_step=rollback", "training.rollback_steps=3")
    ranks = run_ranks(trained, 2, shard, tmp_path / "run", (10,), (*rollback, TENSOR2))
    for ended, losses in ranks:
        assert ended == "0"
        assert list(losses) == list(range(19))  # step 11 was bad, at least 3 back is step 4: 7 batches given up
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "batch 11 is given up, and the run goes back to step 4, with batch 12" in log
    assert list(steps_and_losses(tmp_path / "run")) == list(range(1, 13))
    losses = ranks[0][1]
    expected = [losses[batch] for batch in (*range(4), *range(11, 19))]
    assert list(steps_and_losses(tmp_path / "run").values()) == expected
    telemetry = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "zero_fraction" in line]
    assert telemetry == [0, 3, 6, 9, 12]


def checkpoints_of(folder: Path) -> tuple[str, list[str]]:
    """The one in force, and all that are there."""
    found = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    return (folder / "checkpoints" / "latest").read_text().strip(), found


def test_what_a_rollback_gave_up_does_not_come_back(shard: Path, tmp_path: Path) -> None:
    """Steps 5 to 10 are given up, with step 8's checkpoint; then the run ends before it saves again, or just after."""
    rollback = ("training.on_bad_step=rollback", "training.rollback_steps=3")
    ended_at_once = (*rollback, "training.bad_step_budget=1")
    ((ended, _),) = run_ranks(trained, 1, shard, tmp_path / "ended", (10, 11), ended_at_once)
    assert "is used up" in ended
    assert checkpoints_of(tmp_path / "ended") == ("step-00000004", ["step-00000004", "step-00000008"])
    ((ended, losses),) = run_ranks(trained, 1, shard, tmp_path / "ended", (), rollback)
    assert ended == "0"
    assert list(losses) == list(range(4, 12))
    assert list(steps_and_losses(tmp_path / "ended")) == list(range(1, 13))
    limit = (*rollback, "training.time_limit=900")
    ((ended, _),) = run_ranks(trained, 1, shard, tmp_path / "stopped", (10,), limit, 12)
    assert ended == "75"
    assert checkpoints_of(tmp_path / "stopped") == ("step-00000006", ["step-00000004", "step-00000006"])


def test_a_rollback_without_a_checkpoint_stops(shard: Path, tmp_path: Path) -> None:
    ((ended, _),) = run_ranks(trained, 1, shard, tmp_path / "run", (1,), ("training.on_bad_step=rollback",))
    assert "no checkpoint of at most 0 steps is valid: there is none" in ended


def test_the_budget_ends_the_run(shard: Path, tmp_path: Path) -> None:
    few = ("training.on_bad_step=skip", "training.bad_step_budget=2")
    ((ended, losses),) = run_ranks(trained, 1, shard, tmp_path / "run", (5, 7, 8), few)
    assert list(losses) == list(range(9))
    assert ended.startswith("NumericalError: step 7: loss is nan, after 2 bad steps")
    # Started again it sees them again: they came after the checkpoint.
    ((ended, losses),) = run_ranks(trained, 1, shard, tmp_path / "run", (5, 7, 8), few)
    assert list(losses) == [4, 5, 6, 7, 8]


def test_stopping_is_the_default_and_a_save_in_flight_is_finished(shard: Path, tmp_path: Path) -> None:
    ((ended, losses),) = run_ranks(trained, 1, shard, tmp_path / "run", (4,), ())
    assert list(losses) == list(range(5))
    assert ended.startswith("BadStepError: step 5: loss is nan; the checkpoints are as they were")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000004\n"


def test_a_time_limit_stops_a_run_as_a_signal_does(shard: Path, tmp_path: Path) -> None:
    limit = ("training.time_limit=900",)
    for ended, losses in run_ranks(trained, 2, shard, tmp_path / "run", (), (*limit, TENSOR2), 5):
        assert ended == "75"
        assert list(losses) == list(range(6))
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status.state, status.reason, status.step) == ("STOPPED", "TIME_LIMIT", 6)
    ((ended, losses), _) = run_ranks(trained, 2, shard, tmp_path / "run", (), (*limit, TENSOR2))
    assert (ended, list(losses)) == ("0", list(range(6, 12)))


def test_nothing_random_is_left_to_save() -> None:
    """A step draws no random number, of PyTorch, NumPy or Python: there is no generator to put into a checkpoint."""
    assert run_ranks(random_numbers_of_a_step, 1) == [True]


def random_numbers_of_a_step() -> bool:
    with trainer_of(small_recipe((*FAST, "model.num_layers=1"))) as trainer:
        train_step(trainer, 0)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        train_step(trainer, 1)
        after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    return torch.equal(before[0], after[0]) and np.array_equal(before[1], after[1]) and before[2] == after[2]
