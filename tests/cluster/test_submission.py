"""What `sbn submit` and `sbn sweep submit` write and refuse, with stand-ins for sbatch and squeue."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from time_limit import LIMIT_SECONDS

from megatron_sbn.atomic_files import exclusive
from megatron_sbn.cli import main
from megatron_sbn.cluster import job, snapshot, submission
from megatron_sbn.cluster.batch_script import ranges
from megatron_sbn.config import load_recipe
from megatron_sbn.config.sweep import load_sweep
from megatron_sbn.data.data_check import QUICKSTART_DATA
from megatron_sbn.runs.status import write_status

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
WEAK_SCALING = str(ROOT / "recipes" / "sweeps" / "weak-scaling-qwen2.5-0.5b.yaml")
WITHOUT_ENGINES = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "deepspeed", "megatron", "mlflow", "triton"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Refuse())
from megatron_sbn.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and neither sbatch nor squeue on PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("git", "bash"):
        found = next(Path(folder) / name for folder in ("/usr/bin", "/bin") if (Path(folder) / name).exists())
        (tools / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("SBN_ENV", raising=False)
    monkeypatch.setattr(submission, "_check_data", lambda _: [])  # the shards of the recipes are not there
    work = tmp_path / "a b"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def stand_in(here: Path, name: str, script: str) -> None:
    program = here.parent / "tools" / name
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("sbn: ")
    assert message.count("\n") == 1
    return message


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_dry_run_says_all_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", "2", "--nproc-per-node", "2", "--time", "01:00:00", "run_dir=runs/x", "--dry-run"]
    assert main(["submit", QUICKSTART, *words]) == 0
    said = capsys.readouterr().out
    assert files(here) == set()
    run = here / "runs" / "x"
    for line in (
        f"run folder  {run}",
        "2 nodes x 2 ranks",
        f"$ sbatch --parsable '{run}/submissions/1/quickstart-ternary-6of8.sbatch'",
        f"{run}/logs/sbn-JOB-node-N.log",
        "#SBATCH --nodes=2",
        "#SBATCH --time=01:00:00",
        f"#SBATCH '--output={run}/logs/slurm-%j.out'",
        f"SBN_CODE='{run}/submissions/1/code'",
        f"set -- --nproc-per-node 2 '{run}/submissions/1/recipes/quickstart-ternary-6of8.yaml'",
    ):
        assert line in said


def test_it_works_where_no_engine_is_installed(here: Path) -> None:
    for words in (["submit", QUICKSTART, "--dry-run"], ["sweep", "submit", WEAK_SCALING, "--dry-run"]):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_ENGINES, *words],
            capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "dry run: nothing was written or submitted" in done.stdout
    assert files(here) == set()


def test_what_is_submitted_is_the_code_the_recipe_and_the_script(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = here / "site.sh"
    site.write_text('SBN_SBATCH_OPTIONS=(--account=me "--comment=two words" --gpus-per-node="$SBN_NPROC_PER_NODE")\n')
    monkeypatch.setenv("SBN_ENV", str(site))
    stand_in(here, "sbatch", 'printf "%s\\n" "$@" > arguments; echo 17')
    assert main(["submit", QUICKSTART, "run_dir=runs/x", "training.steps=7"]) == 0
    run = here / "runs" / "x"
    place = run / "submissions" / "1"
    assert (here / "arguments").read_text().splitlines() == ["--parsable", f"{place}/quickstart-ternary-6of8.sbatch"]
    assert "submitted job 17: 1 node x 2 ranks" in capsys.readouterr().out
    assert (place / "quickstart-ternary-6of8.job").read_text() == "17\n"
    script = (place / "quickstart-ternary-6of8.sbatch").read_text()
    for option in ("--account=me", "'--comment=two words'", "--gpus-per-node=2", "--requeue", "--signal=B:USR1@300"):
        assert f"#SBATCH {option}\n" in script
    recipe = load_recipe(place / "recipes" / "quickstart-ternary-6of8.yaml", [])
    assert (recipe.run_dir, recipe.training.steps) == (str(run), 7)
    assert (place / "env.sh").read_text() == site.read_text()
    assert (run / "logs").is_dir()
    copied = files(place / "code")
    assert {"megatron_sbn/train.py", "kernels/sbn_kernels/__init__.py", "slurm/job.sh", ".sbn-commit"} <= copied
    assert not any(name.startswith((".git/", ".venv", "runs")) for name in copied)
    # The copy, which is no checkout, can be submitted from in its turn.
    ask = "from megatron_sbn.cluster.snapshot import find_code as f; print(f().commit, len(f().files), f().scripts)"
    paths = {"PYTHONPATH": f"{place}/code:{place}/code/kernels", "PYTHONSAFEPATH": "1", "PATH": ""}
    output = subprocess.run(
        [sys.executable, "-c", ask], env=os.environ | paths, capture_output=True, text=True, check=True
    )
    commit, count, scripts = output.stdout.strip().split(" ", 2)
    assert (commit, scripts) == (snapshot.find_code().commit, f"{place}/code/slurm")
    assert int(count) > 100


@pytest.mark.parametrize("folder", ["exp #2", "it's", "50%n"])
def test_a_path_means_the_same_to_sbatch_srun_and_the_ranks(
    folder: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(here, "sbatch", "echo 17")
    run = here / folder / "runs" / "x"
    run.parents[1].mkdir()
    monkeypatch.chdir(run.parents[1])
    assert main(["submit", QUICKSTART, "run_dir=runs/x"]) == 0
    place = run / "submissions" / "1"
    ask = 'sbn_main() { printf "%s\\0" "$@"; }'  # in the place of job.sh
    (place / "code" / "slurm" / "job.sh").write_text(ask)
    script = place / "quickstart-ternary-6of8.sbatch"
    said = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True, env={"SLURM_JOB_ID": "17"})
    log, *words = said.stdout.split("\0")[:-1]
    # srun reads a pattern: a path of its own has every % twice.
    assert log == f"{run}/logs/sbn-17-node-".replace("%", "%%") + "%n.log"
    started: list[list[str]] = []

    def start(arguments: list[str], ranks: int, **_: object) -> int:
        started.append(arguments)
        return 0

    monkeypatch.setattr(job, "launch", start)
    assert job.main(["node", *words]) == 0
    ((recipe, *overrides),) = started
    assert load_recipe(recipe, overrides).run_dir == str(run)


def test_a_sweep_is_an_array_for_each_number_of_ranks(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(here, "sbatch", 'echo "$2" >> scripts; wc -l < scripts')
    stand_in(here, "wc", "exec /usr/bin/wc -l")
    assert main(["sweep", "submit", WEAK_SCALING, "--at-most", "3"]) == 0
    study = here / "runs" / "weak-scaling-qwen2.5-0.5b"
    sizes = {8: ("0-3", 1), 16: ("4-7", 2), 32: ("8-11", 4), 64: ("12-15", 8)}
    scripts = [Path(line) for line in (here / "scripts").read_text().splitlines()]
    assert [script.name for script in scripts] == [f"weak-scaling-qwen2.5-0.5b-{ranks}-ranks.sbatch" for ranks in sizes]
    for script, (numbers, nodes) in zip(scripts, sizes.values(), strict=True):
        text = script.read_text()
        assert f"#SBATCH --array={numbers}%3\n" in text
        assert f"#SBATCH --nodes={nodes}\n" in text
        assert f"set -- --nproc-per-node 8 '{script.parent}'/recipes/" in text
    recipes = sorted((study / "submissions" / "1" / "recipes").iterdir())
    assert len(recipes) == 16
    assert {load_recipe(path, []).run_dir for path in recipes} == {str(study / path.stem) for path in recipes}


def test_a_series_is_one_job_that_goes_by_a_copy_of_the_sweep(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = here / "runs" / "weak-scaling-qwen2.5-0.5b"
    shutil.copytree(ROOT / "recipes", here / "recipes")
    path = str(Path(WEAK_SCALING).relative_to(ROOT))
    stand_in(here, "sbatch", 'echo "$2" >> scripts; echo 17')
    assert main(["sweep", "submit", path, "--one-job", "--time", "8:00:00"]) == 0
    assert "submitted job 17: 16 runs in turn, up to 8 nodes x 8 ranks" in capsys.readouterr().out
    place = study / "submissions" / "1"
    (script,) = [Path(line) for line in (here / "scripts").read_text().splitlines()]
    assert script == place / "weak-scaling-qwen2.5-0.5b.sbatch"
    text = script.read_text()
    for line in (
        "#SBATCH --nodes=8",
        "#SBATCH --time=8:00:00",
        f"#SBATCH '--output={place}/slurm-%j.out'",
        f"SBN_LOGS='{place}'",
        f"set -- --nproc-per-node 8 --folder '{here}/runs' '{place}/sweep.yaml'",
    ):
        assert f"{line}\n" in text
    assert "--array" not in text
    # What the job reads is what was submitted, though the files it was made of are gone.
    shutil.rmtree(here / "recipes")
    assert load_sweep(place / "sweep.yaml").variants == load_sweep(WEAK_SCALING).variants
    assert len(list((place / "recipes").iterdir())) == 16
    capsys.readouterr()
    assert job.main(["sizes", "--nproc-per-node", "8", str(place / "sweep.yaml")]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == [f"{number} 1" for number in range(4)]
    assert "left out, needs 8 nodes and there are 1" in output.err


def test_what_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = here / "runs" / "x"
    submit = ("submit", QUICKSTART, f"run_dir={run}")
    assert "sbatch is not on PATH: submit from a login node" in refusal(capsys, *submit)
    assert "3 were started" in refusal(capsys, *submit, "--nodes", "3", "--nproc-per-node", "1", "--dry-run")
    assert "PYTHONPATH, which has no place for a path with ':'" in refusal(capsys, *submit[:2], "run_dir=a:b")
    message = refusal(capsys, *submit, "tracking.uri=http://me:hush@host:5000", "--dry-run")
    assert "tracking.uri = http://***@host:5000 holds a password" in message
    assert "cannot be spread evenly" in refusal(capsys, "sweep", "submit", WEAK_SCALING, "--nproc-per-node", "3")
    assert "cannot be spread evenly" in refusal(
        capsys, "sweep", "submit", WEAK_SCALING, "--one-job", "--nproc-per-node", "7"
    )
    alone = ("sweep", "run", WEAK_SCALING, "--number", "0", "--at-most", "2")
    assert "--at-most 2 goes with --all" in refusal(capsys, *alone)
    words = ("--one-job", "--at-most", "2")
    assert "--one-job runs one recipe at a time" in refusal(capsys, "sweep", "submit", WEAK_SCALING, *words)
    assert files(here) == set()
    run.mkdir(parents=True)
    write_status(run, "FINISHED", 0, 90)
    assert f"run_dir = {run}: finished already, 90 steps" in refusal(capsys, *submit, "--dry-run")
    assert main([*submit, "training.steps=100", "--dry-run"]) == 0


def test_a_run_that_is_in_the_queue_is_not_submitted_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(here, "sbatch", "echo 17")
    stand_in(here, "squeue", '[ "$3" = --jobs=17 ] && echo "17 17"')
    submit = ("submit", QUICKSTART, "run_dir=runs/x")
    assert main([*submit]) == 0
    capsys.readouterr()
    submitted = files(here)
    assert "runs/x/logs" in submitted  # empty, but what the waiting job writes to
    assert "its job 17 is still in the queue" in refusal(capsys, *submit)
    assert "its job 17 is still in the queue" in refusal(capsys, *submit, "--dry-run")
    with exclusive(here / "runs" / "x" / "submission"):
        assert "another process is writing" in refusal(capsys, *submit)
    assert files(here) == submitted
    stand_in(here, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert "squeue failed (slurm_load_jobs error" in refusal(capsys, *submit)
    stand_in(here, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert main([*submit]) == 0
    assert (here / "runs" / "x" / "submissions" / "2" / "quickstart-ternary-6of8.job").is_file()


def test_what_sbatch_refuses_leaves_no_submission(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(here, "sbatch", "echo 'sbatch: error: invalid account' >&2; exit 1")
    message = refusal(capsys, "submit", QUICKSTART, "run_dir=runs/x")
    assert "sbatch refused " in message
    assert "invalid account" in message
    assert not (here / "runs" / "x").exists()
    # Of a run that was there before, all that it had stays.
    (here / "runs" / "x" / "logs").mkdir(parents=True)
    (here / "runs" / "x" / "logs" / "rank-0.log").touch()
    refusal(capsys, "submit", QUICKSTART, "run_dir=runs/x")
    assert files(here / "runs" / "x") == {"logs", "logs/rank-0.log"}
    refusal(capsys, "sweep", "submit", WEAK_SCALING)
    assert files(here / "runs") == {"x", "x/logs", "x/logs/rank-0.log"}


def test_a_job_that_was_taken_keeps_its_code_whatever_fails_then(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    # The copy of the code was the last that the disk had room for.
    stand_in(here, "sbatch", "echo 17")
    run = subprocess.run

    def fill(command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        if command[0] == "sbatch":
            monkeypatch.setattr(Path, "write_text", full)
            monkeypatch.setattr(Path, "write_bytes", full)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", fill)
    message = refusal(capsys, "submit", QUICKSTART, "run_dir=runs/x")
    assert "job 17 is submitted all the same: let it run, or scancel it" in message
    assert (here / "runs" / "x" / "submissions" / "1" / "code" / "slurm" / "job.sh").is_file()


def test_arrays_that_were_taken_stay_when_a_later_one_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(here, "sbatch", 'case "$2" in *-64-ranks.sbatch) echo "too large" >&2; exit 1 ;; esac; echo 17')
    assert "too large" in refusal(capsys, "sweep", "submit", WEAK_SCALING)
    study = here / "runs" / "weak-scaling-qwen2.5-0.5b"
    assert len(list((study / "submissions" / "1").glob("*.job"))) == 3
    assert len(list(study.glob("*/logs"))) == 16


def test_a_run_of_a_study_whose_job_waits_is_not_submitted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(here, "sbatch", "echo 17")
    stand_in(here, "squeue", 'case "$*" in *--jobs=17*) echo "17 18" ;; esac')
    assert main(["sweep", "submit", WEAK_SCALING]) == 0
    capsys.readouterr()
    study = here / "runs" / "weak-scaling-qwen2.5-0.5b"
    of_study = str(study / "weak-scaling-qwen2.5-0.5b-8-ranks-tp1-zero1")
    assert f"{of_study}: job 17 of its study is still in the queue" in refusal(
        capsys, "submit", QUICKSTART, f"run_dir={of_study}"
    )
    assert main(["submit", QUICKSTART, f"run_dir={study}/another", "--dry-run"]) == 0


def test_a_run_is_not_submitted_while_its_study_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = here / "runs" / "weak-scaling-qwen2.5-0.5b" / "weak-scaling-qwen2.5-0.5b-8-ranks-tp1-zero1"
    again = f'"{sys.executable}" -m megatron_sbn.cli submit "{QUICKSTART}" "run_dir={run}" >said 2>&1'
    for name in (
        "stdlib-train.idx",
        "stdlib-train.bin",
        "stdlib-validation.idx",
        "stdlib-validation.bin",
        "stdlib.model",
    ):
        path = here / QUICKSTART_DATA / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    stand_in(here, "sbatch", f'case "$2" in *ranks.sbatch) {again}; echo "too large" >&2; exit 1 ;; esac; echo 18')
    assert "too large" in refusal(capsys, "sweep", "submit", WEAK_SCALING)
    # Accepted, its job would wait for a folder of logs that goes with the study's submission.
    assert "another process is writing this output" in (here / "said").read_text()
    assert not (here / "runs" / "weak-scaling-qwen2.5-0.5b").exists()


def test_a_site_file_that_bash_cannot_read(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBN_ENV", str(here / "absent.sh"))
    assert "absent.sh: bash cannot read it" in refusal(capsys, "submit", QUICKSTART, "--dry-run")


def test_code_that_is_too_large_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "MOST_BYTES", 1 << 20)
        assert "MiB of code to copy, at most 1; is " in refusal(capsys, "submit", QUICKSTART, "--dry-run")


def test_data_that_is_not_there_is_not_trained_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(here)
    missing = f"data.train: {QUICKSTART_DATA}/stdlib-train.idx: no such token shard; `sbn quickstart --prepare-only`"
    assert missing in refusal(capsys, "submit", QUICKSTART, "run_dir=runs/x")
    assert "data.train: data/corpus-train.idx: no such token shard; `sbn prepare`" in refusal(
        capsys, "sweep", "submit", WEAK_SCALING
    )
    assert main(["submit", QUICKSTART, "--dry-run"]) == 0
    assert f"not there yet: {missing}" in capsys.readouterr().out
    assert files(here) == set()


def test_a_time_that_is_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["submit", QUICKSTART, "--dry-run", "--time", "tomorrow"])
    assert "'tomorrow' is no time" in capsys.readouterr().err


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
