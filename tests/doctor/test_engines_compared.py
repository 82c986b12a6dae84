"""`sbn doctor --engines`: another environment's ranks are started, and a single other bit is a difference."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from megatron_sbn.cli import main
from megatron_sbn.config import load_recipe
from megatron_sbn.doctor import engines, layouts
from megatron_sbn.doctor.report import Trial
from megatron_sbn.errors import RecipeError

QUICK = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")


def trial(hidden: torch.Tensor, losses: list[float], norms: list[float], resumed: list[float]) -> Trial:
    codes = torch.tensor([[1, 0, -1, 0]], dtype=torch.int8)
    return Trial({"a.codes": codes, "hidden": hidden}, losses, norms, [{}], resumed, norms[2:])


HIDDEN = torch.linspace(-1.0, 1.0, 6)
FIRST = trial(HIDDEN, [4.0, 3.0, 2.5, 2.25], [1.0, 1.0, 0.5, 0.5], [2.5, 2.25])


def test_equal_bits_are_no_difference() -> None:
    found = engines.differences(FIRST, FIRST, 2)
    assert found == {"codes": 0.0, "hidden": 0.0, "loss": 0.0, "grad norm": 0.0, "resumed": 0.0}


def test_one_bit_is_a_difference() -> None:
    moved = HIDDEN.clone()
    moved[3] = torch.nextafter(moved[3], torch.tensor(2.0))
    found = engines.differences(trial(moved, FIRST.losses, FIRST.grad_norms, FIRST.resumed_losses), FIRST, 2)
    assert 0 < found["hidden"] < 1e-6
    assert found["codes"] == found["loss"] == 0.0


@pytest.mark.parametrize(
    ("column", "losses", "norms", "resumed"),
    [
        ("loss", [4.0, 3.0, math.nextafter(2.5, 3), 2.25], FIRST.grad_norms, [2.5, 2.25]),
        ("grad norm", FIRST.losses, [1.0, math.nextafter(1.0, 2), 0.5, 0.5], [2.5, 2.25]),
        ("resumed", FIRST.losses, FIRST.grad_norms, [2.5, math.nextafter(2.25, 3)]),
        ("resumed", FIRST.losses, FIRST.grad_norms, [2.5]),
    ],
)
def test_a_number_of_any_step_is_compared(
    column: str, losses: list[float], norms: list[float], resumed: list[float]
) -> None:
    found = engines.differences(trial(HIDDEN, losses, norms, resumed), FIRST, 2)
    assert [name for name, value in found.items() if value] == [column]


NAN = float("nan")


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [([1.0, NAN], [1.0, 2.0], False), ([1.0, 2.0], [1.0, NAN], False), ([NAN], [NAN], True), ([0.0], [0.0], True),
     ([1.0], [0.0], False), ([-0.0], [0.0], False)],
)  # fmt: skip
def test_what_is_no_number_is_compared_too(ours: list[float], theirs: list[float], same: bool) -> None:
    assert (engines._numbers(ours, theirs) == 0) == same
    first, second = (Trial({"hidden": torch.tensor(values)}, [1.0], [1.0], [{}]) for values in (ours, theirs))
    assert (engines.differences(first, second, 1)["hidden"] == 0) == same


def test_a_tensor_that_only_one_has_is_a_difference() -> None:
    more = Trial(FIRST.tensors | {"b.codes": HIDDEN}, FIRST.losses, FIRST.grad_norms, [{}], FIRST.resumed_losses)
    assert engines.differences(more, FIRST, 2)["codes"] == math.inf


def test_ranks_that_fail_leave_the_others_to_be_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = layouts.candidates
    kept = ("tensor 2", layouts.SPREAD)
    monkeypatch.setattr(engines, "candidates", lambda recipe: {k: v for k, v in every(recipe).items() if k in kept})
    started: list[engines.Start] = []

    def run_trials(group: dict[str, object], steps: int, start: engines.Start) -> dict[str, Trial]:
        started.append(start)
        if len(started) == 4:  # two ranks of the second environment
            raise engines.TrialError("tensor 2: a rank ended with status 1, see above")
        return dict.fromkeys(group, FIRST)

    monkeypatch.setattr(engines, "run_trials", run_trials)
    file = tmp_path / "report.json"
    assert main(["doctor", QUICK, "--engines", sys.executable, "--json", str(file)]) == 1
    saved = [start.save for start in started]
    assert saved[:2] == [start.resume for start in started[:2]] == [start.resume for start in started[2:]]
    assert len(set(saved[:2])) == 2, "a start numbers its layouts from 0"
    assert saved[2:] == [None, None]
    out = capsys.readouterr().out
    assert "failed: tensor 2: a rank ended with status 1" in out
    assert "1 of 2 differ, inf" in out
    report = json.loads(file.read_text())
    assert report["environments"][1]["differences"]["tensor 2"]["codes"] == "inf"
    assert report["environments"][1]["differences"][layouts.SPREAD]["codes"] == 0


def test_a_missing_tensor_is_a_difference() -> None:
    fewer = Trial({"hidden": HIDDEN}, FIRST.losses, FIRST.grad_norms, [{}], FIRST.resumed_losses, FIRST.resumed_norms)
    assert engines.differences(fewer, FIRST, 2)["codes"] == math.inf


def test_another_environment_is_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This interpreter under another name, started with this project's code from links."""
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    every = layouts.candidates
    kept = ("tensor 2", "data 2, ZeRO-2")
    monkeypatch.setattr(engines, "candidates", lambda recipe: {k: v for k, v in every(recipe).items() if k in kept})
    file = tmp_path / "report.json"
    assert main(["doctor", QUICK, "--engines", str(other), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "equal"
    assert out.splitlines()[-2].startswith("note: the same bits with megatron-core ")
    rows = [line.split()[len(engines.NAMES) :] for line in out.splitlines() if line.startswith("0.")]
    assert rows == [["equal"] * len(engines.COLUMNS)] * 2
    assert "megatron_sbn.doctor.rank" in (tmp_path / "calls").read_text()
    report = json.loads(file.read_text())
    assert report["equal"] is True
    first, second = report["environments"]
    assert first["digests"] == second["digests"]
    assert set(first["digests"]) == set(kept)
    assert len(set(first["digests"]["tensor 2"]["hidden"])) > 1


def test_the_note_names_every_release_once() -> None:
    same = {"torch": "2.13.0", "deepspeed": "0.19.8", "triton": "3.7.1", "python": "3.12.1"}
    environments = [
        engines.Environment("p", same | {"megatron-core": c}) for c in ("0.16.1", "0.18.2", "0.16.1", "0.19.2")
    ]
    note = engines.release_note(load_recipe(QUICK), environments, 15, 4)
    assert "megatron-core 0.16.1, 0.18.2 and 0.19.2; torch 2.13.0; deepspeed 0.19.8" in note
    assert "15 layouts of quickstart-ternary-6of8" in note


@pytest.mark.parametrize(
    ("script", "report"),
    [
        (None, "cannot be run: "),
        ("exit 3", "it ended without a word; give the bin/python"),
        ("true", "is no Python: it answered ''"),
        ("echo hello", "is no Python: it answered 'hello"),
        (f'exec {sys.executable} -S "$@"', "No module named"),
    ],
)
def test_an_interpreter_that_cannot_answer_is_named(script: str | None, report: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    with engines._code_for_others() as code, pytest.raises(RecipeError) as error:
        engines.ask(str(python), {"PYTHONPATH": str(code)})
    assert str(error.value).startswith(f"--engines {python}: ")
    assert report in str(error.value)


def test_what_an_interpreter_prints_at_its_start_is_passed_over(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho welcome\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with engines._code_for_others() as code:
        assert set(engines.NAMES) <= set(engines.ask(str(python), {"PYTHONPATH": str(code)}).releases)
