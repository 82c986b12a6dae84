"""`sbn status`, `sbn logs` and `sbn cancel`, with stand-ins for squeue and scancel."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from time_limit import LIMIT_SECONDS

from megatron_sbn.atomic_files import exclusive
from megatron_sbn.cli import main
from megatron_sbn.cluster.run_states import HEADER, run_folders
from megatron_sbn.runs.metrics_file import MetricsFile
from megatron_sbn.runs.status import State, write_status


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with runs/, and no Slurm on PATH."""
    (tmp_path / "tools").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/tools:/bin")
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stand_in(here: Path, name: str, script: str) -> None:
    (here / "tools" / name).write_text(f"#!/bin/bash\n{script}\n")
    (here / "tools" / name).chmod(0o755)


def add_run(name: str, state: State | None, *, steps: int = 100, job: str = "", losses: int = 0) -> Path:
    folder = Path("runs") / name
    (folder / "logs").mkdir(parents=True)
    if state is not None:
        (folder / "recipe.yaml").write_text(f"name: x\ntraining:\n  steps: {steps}\n")
        os.environ.pop("SLURM_JOB_ID", None)
        if job:
            os.environ["SLURM_JOB_ID"] = job
        write_status(folder, state, None, losses, "SIGTERM" if state == "STOPPED" else "")
        os.environ.pop("SLURM_JOB_ID", None)
    if losses:
        metrics = MetricsFile(folder / "metrics.jsonl")
        metrics.append(1, {"validation_loss": 5.0, "validation_perplexity": 148.4})
        for step in range(1, losses + 1):
            metrics.append(step, {"loss": 5 - step / 1000, "histogram": 1.0})
        metrics.close()
    return folder


def submitted(folder: Path, job: str, names: dict[int, str] | None = None, *, array: bool = True) -> None:
    """As `sbn submit` (or `sbn sweep submit` for `names`) leaves it."""
    place = folder / "submissions" / "1"
    (place / "recipes").mkdir(parents=True)
    text = "\n".join(
        ["#SBATCH --array=0-1" if array else "", *(f"    [{n}]={name}" for n, name in (names or {}).items())]
    )
    (place / "x.sbatch").write_text(text if array else "")
    (place / "x.job").write_text(f"{job}\n")
    for name in names.values() if names else [folder.name]:
        (place / "recipes" / f"{name}.yaml").write_text("training:\n  steps: 1234\n")


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list[str]]:
    assert main(["status", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = [lines[0].index(name) for name in HEADER]
    cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for line in lines[2:]]
    return {row[0]: row[1:] for row in cells}


def test_a_row_for_every_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_run("done", "FINISHED", losses=100)
    add_run("stopped", "STOPPED", losses=40)
    add_run("killed", "RUNNING", losses=7)
    add_run("held", "RUNNING", losses=7)
    (Path("runs") / "data").mkdir()
    with (Path("runs") / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": 3')  # torn
    with exclusive(Path("runs") / "held" / "run"):
        said = rows(capsys)
    assert list(said) == ["runs/done", "runs/held", "runs/killed", "runs/stopped"]
    state, step, loss, perplexity, age, job = said["runs/done"]
    assert (state, step, loss, perplexity, job) == ("FINISHED", "100 / 100", "4.9000", "148.40", "-")
    assert age in [f"{seconds} s ago" for seconds in range(60)]
    assert said["runs/stopped"][:3] == ["STOPPED (SIGTERM)", "40 / 100", "4.9600"]
    assert (said["runs/held"][0], said["runs/killed"][0]) == ("RUNNING", "RUNNING?")


def test_jobs_of_runs_and_studies(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submitted(add_run("waiting", None), "17")
    submitted(add_run("on", "RUNNING", job="18", losses=3), "18")
    names = {0: "s-a", 1: "s-b"}
    add_run("s/s-a", "RUNNING", job="21", losses=2)
    add_run("s/s-b", None)
    submitted(Path("runs") / "s", "20", names)
    queue = [
        "17|17|N/A|PENDING|Resources",
        "18|18|N/A|RUNNING|None",
        "20|21|0|RUNNING|None",
        "20|20|1|PENDING|Priority",
    ]
    stand_in(here, "squeue", "".join(f"echo '{line}'\n" for line in queue))
    said = rows(capsys)
    assert said["runs/waiting"] == ["WAITING", "0 / 1,234", "-", "-", "-", "17 PENDING (Resources)"]
    assert (said["runs/on"][0], said["runs/on"][-1]) == ("RUNNING", "18 RUNNING")
    assert said["runs/s/s-a"][-1] in ("20_0 RUNNING", "21 RUNNING")
    assert (said["runs/s/s-b"][0], said["runs/s/s-b"][-1]) == ("WAITING", "20_1 PENDING (Priority)")
    assert [str(folder) for folder in run_folders(["runs/s", "runs/on"])] == ["runs/s/s-a", "runs/s/s-b", "runs/on"]
    stand_in(here, "scancel", f'echo "$*" >>{here}/cancelled')
    assert main(["cancel", "runs/on", "runs/waiting", "runs/s"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("runs/on: job 18 was told to end (SIGTERM): it saves a checkpoint and is not started again")
    assert lines[1] == "runs/waiting: job 17 was PENDING (Resources) and is out of the queue"
    cancelled = (here / "cancelled").read_text().splitlines()
    assert cancelled[:2] == ["18", "17"]
    assert cancelled[2] in ("20_0", "21")
    assert cancelled[3] == "20_1"
    assert not list(here.rglob("STOP"))
    stand_in(here, "scancel", "echo 'scancel: error: Access denied' >&2; exit 1")
    assert main(["cancel", "runs/on"]) == 2
    message = (
        "sbn: runs/on: scancel 18 failed (scancel: error: Access denied); try again, or make a file runs/on/STOP\n"
    )
    assert capsys.readouterr().err == message


def test_a_series_goes_on_without_the_run_that_is_cancelled(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = add_run("s/s-a", "RUNNING", job="30", losses=2)
    submitted(Path("runs") / "s", "30", {0: "s-a", 1: "s-b"}, array=False)
    stand_in(here, "squeue", "echo '30|30|N/A|RUNNING|None'")
    assert main(["cancel", str(folder)]) == 0
    assert "job 30 runs other recipes too, and goes on with them; made runs/s/s-a/STOP" in capsys.readouterr().out
    assert (folder / "STOP").exists()


def test_a_run_of_this_machine_gets_a_stop_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held, dead, done = (add_run(*words) for words in (("held", "RUNNING"), ("dead", "RUNNING"), ("done", "FINISHED")))
    with exclusive(held / "run"):
        assert main(["cancel", "runs/held", "runs/dead", "runs/done"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "runs/held: made runs/held/STOP: it saves a checkpoint after its step, or does not begin; "
        "remove that file before it may go on",
        "runs/dead: nothing to cancel, no process has this run any more",
        "runs/done: nothing to cancel, it is FINISHED",
    ]
    assert [(folder / "STOP").exists() for folder in (held, dead, done)] == [True, False, False]
    assert main(["cancel", "runs/nothing"]) == 2
    assert "runs/nothing: is not there; name the folder of a run" in capsys.readouterr().err


def test_files_that_hold_anything_else_are_no_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = add_run("x", "STOPPED", losses=3)
    nested = "[" * 100_000
    for text in ("[1]", '"training"', "training: 3", "training: {steps: [1]}", "training: {steps: many}", "{", nested):
        (folder / "recipe.yaml").write_text(text)
        assert rows(capsys)["runs/x"][1] == "3 / ?"
    lines = ['{"step": Infinity}', '{"step": 1e999}', "[]", nested, '{"step": 5, "loss": "NaN"}', '{"loss": [1]}', "{"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
    (folder / "status.json").write_text("{")
    assert rows(capsys)["runs/x"][:3] == ["-", "5 / ?", "nan"]


def test_a_job_that_is_gone_is_told_from_a_slurm_that_does_not_answer(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = add_run("x", "RUNNING", job="40")
    stand_in(here, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert rows(capsys)["runs/x"][0] == "RUNNING?"
    assert main(["cancel", str(folder)]) == 0
    assert capsys.readouterr().out == "runs/x: nothing to cancel, its job 40 is not in the queue\n"
    stand_in(here, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert rows(capsys)["runs/x"][0] == "RUNNING"
    assert main(["cancel", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("runs/x: made runs/x/STOP: ")


def test_logs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = add_run("x", "FINISHED")
    (folder / "logs" / "sbn-1-node-0.log").touch()
    assert main(["logs", str(folder)]) == 2
    assert capsys.readouterr().err == ("sbn: runs/x/logs/rank-0.log: is not there; see runs/x/logs/sbn-1-node-0.log\n")
    (folder / "logs" / "rank-0.log").write_text("step 1\nstep 2\n")
    assert main(["logs", str(folder), "--follow"]) == 0  # it is over
    output = capsys.readouterr()
    assert (output.out, output.err) == ("step 1\nstep 2\n", "also: runs/x/logs/sbn-1-node-0.log\n")


def test_following_ends_with_the_run(here: Path) -> None:
    folder = add_run("x", "RUNNING")
    log = folder / "logs" / "rank-0.log"
    command = [sys.executable, "-m", "megatron_sbn.cli", "logs", str(folder), "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        log.write_text("first\n")
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        with log.open("a") as file:
            file.write("second\n")
        write_status(folder, "FINISHED", 0, 2)
        assert process.communicate(timeout=LIMIT_SECONDS)[0] == "second\n"
    assert process.returncode == 0


def test_many_runs_take_no_torch_and_no_time(here: Path) -> None:
    for number in range(50):
        add_run(f"run-{number:02}", "FINISHED", losses=2000)
    code = "import sys; from megatron_sbn.cli import main; sys.exit(main(['status']) or 'torch' in sys.modules)"
    start = time.process_time(), time.monotonic()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=LIMIT_SECONDS, check=True)
    assert time.monotonic() - start[1] < 10  # 0.3 s on a quiet machine
    line = json.loads(Path("runs/run-00/metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 2000
