"""What the launcher knows before ranks start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sbn.cli import main
from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.errors import CheckpointError, InputError, RecipeError, SbnError
from megatron_sbn.runs.status import write_status
from megatron_sbn.training.preflight import check_start, finished_already

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
