"""What the launcher knows before ranks start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_sbn.atomic_files import exclusive
from megatron_sbn.checkpoint.directory import begin, publish
from megatron_sbn.checkpoint.manifest import MANIFEST, STATE, DataPosition, Layout, State, manifest_text, state_text
from megatron_sbn.checkpoint.regions import Region
from megatron_sbn.checkpoint.shards import Chunk, Written, describe, merge, write_chunks
from megatron_sbn.cli import main
from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.errors import CheckpointError, InputError, RecipeError, SbnError
from megatron_sbn.runs.status import read_status, write_status
from megatron_sbn.training.preflight import check_start, finished_already, record_death, record_stop

QUICK = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICK, overrides)


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        (["run_dir=/proc/run"], InputError, "run_dir = /proc/run: /proc cannot be written"),
        (["run_dir={file}/run"], InputError, "file cannot be written"),
        (["tracking.uri=mlruns"], RecipeError, "tracking.uri = 'mlruns'"),
        (["start_from={file}-not"], CheckpointError, "there is no checkpoint; name a run's folder"),
    ],
)
def test_a_start_that_cannot_succeed(
    overrides: list[str], kind: type[SbnError], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = [word.format(file=tmp_path / "file") for word in overrides]
    with pytest.raises(kind, match=message):
        check_start(recipe(*words))
    assert main(["train", str(QUICK), *words]) == kind.status
    assert capsys.readouterr().err.count("\n") == 1


def test_a_finished_run_is_said_and_starts_no_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_sbn.launch.launch", lambda *_: pytest.fail("a rank was started"))
    steps = recipe().training.steps
    write_status(tmp_path, "FINISHED", 0, steps)
    assert main(["train", str(QUICK), f"run_dir={tmp_path}"]) == 0
    assert f"finished already, {steps} steps; raise training.steps" in capsys.readouterr().out
    for overrides in ([f"training.steps={2 * steps}"], ["checkpoint.resume=never"]):
        assert finished_already(recipe(f"run_dir={tmp_path}", *overrides)) is None


def checkpoint(run: Path, step: int, tensor: str) -> None:
    """A checkpoint of one tensor; its run folder has `latest`."""
    folder = run / "checkpoints"
    state = State(
        step=step,
        layout=Layout(tensor=1, pipeline=1, data=1, virtual_pipeline=1, expert=1, zero_stage=1),
        data=DataPosition(batches=step, seed=1, global_batch_size=1, seq_length=1),
        optimizer_steps=step,
    )
    path = begin(folder, step)
    (path / STATE).write_bytes(state_text(state))
    chunk = Chunk(tensor, (2,), Region((0,), (2,)), torch.zeros(2))
    written = [Written({STATE: describe(path / STATE)}, {}), write_chunks(path, 0, [chunk])]
    (path / MANIFEST).write_bytes(manifest_text(merge(written)))
    publish(folder, step)


def test_a_branch_that_has_nothing_to_do_or_to_begin_with(tmp_path: Path) -> None:
    checkpoint(tmp_path / "whole", 90, "optimizer.exp_avg.a")
    checkpoint(tmp_path / "average", 10, "a")
    with pytest.raises(RecipeError, match=r"training.steps = 90: .*whole.*is of step 90, so nothing is left to do"):
        check_start(recipe(f"start_from={tmp_path / 'whole'}"))
    with pytest.raises(CheckpointError, match=r"average.* has weights and no optimizer state; set start_with=weights"):
        check_start(recipe(f"start_from={tmp_path / 'average'}"))
    for words in ((f"start_from={tmp_path / 'whole'}", "training.steps=91"), (f"start_from={tmp_path / 'average'}",)):
        check_start(recipe(*words, *(["start_with=weights"] if "average" in words[0] else [])))


def test_a_finished_run_that_was_set_back_goes_on(tmp_path: Path) -> None:
    steps = recipe().training.steps
    write_status(tmp_path, "FINISHED", 0, steps)
    checkpoint(tmp_path, 30, "a")
    assert finished_already(recipe(f"run_dir={tmp_path}")) is None
    checkpoint(tmp_path, steps, "a")
    assert finished_already(recipe(f"run_dir={tmp_path}")) is not None


@pytest.mark.parametrize(
    ("word", "message"), [("model.hiden_size=3", "is not a recipe key"), ("data.train=nowhere", "nowhere")]
)
def test_torchrun_gets_the_line_in_its_error_file(word: str, message: str, tmp_path: Path) -> None:
    """Its summary shows that file's message instead of "To enable traceback see"; ranks look at the data too."""
    file = tmp_path / "error.json"
    environment = os.environ | {"TORCHELASTIC_ERROR_FILE": str(file)}
    command = [sys.executable, "-m", "megatron_sbn.train", str(QUICK), "parallel.tensor=1", word]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    line = done.stderr.strip()
    assert message in line
    assert json.loads(file.read_text())["message"]["message"] == line


def test_ranks_that_are_gone_leave_no_run_that_runs_for_ever(tmp_path: Path) -> None:
    run = recipe(f"run_dir={tmp_path}")
    write_status(tmp_path, "RUNNING", None, 0)
    with exclusive(tmp_path / "run"):  # another process trains there
        record_death(run, 137)
        record_stop(run, "SIGTERM")
    for status in (0, 75):
        record_death(run, status)
    found = read_status(tmp_path)
    assert found is not None
    assert found.state == "RUNNING"
    record_death(run, 137)
    found = read_status(tmp_path)
    assert found is not None
    assert (found.state, found.exit_status) == ("FAILED", 137)
    record_death(run, 1)  # what a run said of itself stays
    assert read_status(tmp_path) == found
    record_stop(run, "SIGTERM")
    stopped = read_status(tmp_path)
    assert stopped is not None
    assert (stopped.state, stopped.reason) == ("STOPPED", "SIGTERM")
