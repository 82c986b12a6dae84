"""slurm/job.sh with stand-ins for srun, scontrol and Python: a signal is remembered whenever it comes."""

import subprocess
import sys
from pathlib import Path

import pytest
from time_limit import LIMIT_SECONDS

ROOT = Path(__file__).parents[2]
# `$SIGNALLED` is the moment at which the batch shell, the parent of them all, is signalled.
PYTHON = """#!/bin/bash
echo "python $*" >>"$FOLDER/said"
[ "$SIGNALLED" = "$3" ] && kill -"$SIGNAL" "$PPID"
[ "$3" = end ] || exit 0
case "$*" in *"--asked USR1"*) exit 75 ;; *"--asked TERM"*) exit 1 ;; esac
"""
SRUN = """#!/bin/bash
echo "srun" >>"$FOLDER/said"
trap 'echo "srun got USR1" >>"$FOLDER/said"; exit 138' USR1
trap 'echo "srun got TERM" >>"$FOLDER/said"; exit 143' TERM
[ "$SIGNALLED" = srun ] || exit 0
kill -"$SIGNAL" "$PPID"
for _ in {1..100}; do sleep 0.05; done
"""
SCRIPT = """
SBN_CODE={code}
source {code}/slurm/job.sh
sbn_main {folder}/log recipe.yaml
"""


@pytest.mark.parametrize(
    ("moment", "signal", "expected", "status"),
    [
        ("never", "USR1", ["srun", "end 0 -"], 0),
        ("environment", "USR1", ["end 138 USR1", "requeue 7"], 75),
        ("begin", "USR1", ["end 138 USR1", "requeue 7"], 75),
        ("begin", "TERM", ["end 143 TERM"], 1),
        ("srun", "USR1", ["srun", "srun got USR1", "end 138 USR1", "requeue 7"], 75),
        ("srun", "TERM", ["srun", "srun got TERM", "end 143 TERM"], 1),
    ],
)
def test_a_signal(moment: str, signal: str, expected: list[str], status: int, tmp_path: Path) -> None:
    requeue = '#!/bin/bash\necho "$*" >>"$FOLDER/said"; exit 1\n'
    for name, text in (("python", PYTHON), ("srun", SRUN), ("scontrol", requeue)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    at_once = 'kill -"$SIGNAL" $$' if moment == "environment" else ":"
    (tmp_path / "env.sh").write_text(
        f"SBN_PYTHON={tmp_path}/python\nSBN_CONTAINER=()\nsbn_node_environment() {{ {at_once}; }}\n"
    )
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "FOLDER": str(tmp_path), "SBN_ENV": f"{tmp_path}/env.sh"}
    environment |= {"SIGNALLED": moment, "SIGNAL": signal, "SLURM_JOB_ID": "7"}
    script = SCRIPT.format(code=ROOT, folder=tmp_path)
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, timeout=LIMIT_SECONDS, check=False
    )
    assert done.returncode == status, done.stderr
    said = []
    for line in (tmp_path / "said").read_text().splitlines():
        words = line.split()
        if words[:4] == ["python", "-m", "megatron_sbn.cluster", "end"]:
            asked = words[words.index("--asked") + 1]
            said.append(f"end {words[words.index('--srun-status') + 1]} {'-' if asked == 'recipe.yaml' else asked}")
        elif words[0] != "python":
            said.append(line)
    assert said == expected


def test_what_a_site_sets_reaches_python(tmp_path: Path) -> None:
    names = ("SBN_NPROC_PER_NODE", "SBN_MAX_RESTARTS", "SBN_MAX_FAILURES", "MASTER_ADDR", "MASTER_PORT")
    variables = " ".join(f"{name}=${name}" for name in names)
    (tmp_path / "python").write_text(f'#!/bin/bash\necho "{variables}" >"$FOLDER/said"; exit 10\n')
    (tmp_path / "python").chmod(0o755)
    settings = "".join(f"{name}={number}\n" for number, name in enumerate(names, start=1))
    (tmp_path / "env.sh").write_text(f"SBN_PYTHON={tmp_path}/python\n{settings}sbn_node_environment() {{ :; }}\n")
    environment = {"PATH": "/usr/bin:/bin", "FOLDER": str(tmp_path), "SBN_ENV": f"{tmp_path}/env.sh"}
    script = SCRIPT.format(code=ROOT, folder=tmp_path)
    subprocess.run(["bash", "-c", script], env=environment, capture_output=True, timeout=LIMIT_SECONDS, check=True)
    said = (tmp_path / "said").read_text().split()
    assert said == [f"{name}={number}" for number, name in enumerate(names, start=1)]


def run_script(folder: Path, site: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """The batch script of a run with FOLDER/env.sh, and an srun that must not be asked."""
    (folder / "env.sh").write_text(site)
    (folder / "srun").write_text("#!/bin/bash\necho srun was started\n")
    (folder / "srun").chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SBN_ENV": f"{folder}/env.sh", "HOSTNAME": "n1"} | variables
    script = SCRIPT.format(code=ROOT, folder=folder)
    return subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ("module load cuda/99\n    export NCCL_DEBUG=INFO", "env.sh:4: `module load cuda/99` failed with status 1"),
        ("export X=$(cat /nowhere)\n    cd /nowhere", "env.sh:5: `cd /nowhere` failed with status 1"),
        ("absent-command", "env.sh:4: `absent-command` failed with status 127"),
    ],
)
def test_a_site_file_that_fails_ends_the_job_with_one_line(lines: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "modules.sh").write_text('module() { false; [ "$2" != cuda/99 ]; }\n')
    site = f"source {tmp_path}/modules.sh\nSBN_PYTHON=/bin/true\nsbn_node_environment() {{\n    {lines}\n}}\n"
    done = run_script(tmp_path, site)
    assert done.returncode == 2
    assert f"{tmp_path}/{named} on n1; mend it, or set SBN_ENV" in done.stderr.splitlines()[-1]
    assert "srun" not in done.stdout


def test_a_site_file_whose_last_condition_is_false_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "modules.sh").write_text("module() { false; true; }\n")
    lines = "module load cuda\n    [ -d /nowhere ] && export X=1"
    done = run_script(
        tmp_path, f"source {tmp_path}/modules.sh\nSBN_PYTHON=/bin/true\nsbn_node_environment() {{\n    {lines}\n}}\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "srun was started" in done.stdout


def test_the_interpreter(tmp_path: Path) -> None:
    bare = "sbn_node_environment() { :; }\n"
    for name, text in (("own", "exec"), ("python3", "exec"), ("container", "exec")):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $1" >>"{tmp_path}/said"; exit 10\n')
        (tmp_path / name).chmod(0o755)
        assert text
    said = tmp_path / "said"
    for site, variables, expected in (
        (bare, {"SBN_SUBMITTED_BY": f"{tmp_path}/own"}, "own -m"),
        (bare, {}, "python3 -m"),
        (f"SBN_PYTHON=python3\n{bare}", {"SBN_SUBMITTED_BY": f"{tmp_path}/own"}, "python3 -m"),
        (f"SBN_CONTAINER=({tmp_path}/container)\n{bare}", {"SBN_SUBMITTED_BY": f"{tmp_path}/own"}, "container python3"),
    ):
        assert run_script(tmp_path, site, **variables).returncode == 0
        assert said.read_text() == f"{expected}\n"
        said.unlink()


def test_an_interpreter_that_cannot_do_it_is_named_and_nothing_starts(tmp_path: Path) -> None:
    absent = run_script(tmp_path, "SBN_PYTHON=/nowhere/python\nsbn_node_environment() { :; }\n")
    assert (absent.returncode, absent.stdout) == (2, "")
    last = absent.stderr.splitlines()[-1]
    assert (
        last.strip()
        == f"sbn: /nowhere/python cannot be started on n1; set SBN_PYTHON in {tmp_path}/env.sh to a Python of the nodes"
    )
    # One without the packages: -S leaves site-packages out.
    (tmp_path / "bare").write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')
    (tmp_path / "bare").chmod(0o755)
    bare = run_script(tmp_path, f"SBN_PYTHON={tmp_path}/bare\nsbn_node_environment() {{ :; }}\n")
    assert (bare.returncode, bare.stdout) == (2, "")
    assert bare.stderr.count("\n") == 1
    assert bare.stderr.startswith(f"sbn: {sys.executable} on ")
    assert "cannot import megatron_sbn (No module named " in bare.stderr


@pytest.mark.parametrize("container", [False, True])
def test_options_of_srun(container: bool, tmp_path: Path) -> None:
    (tmp_path / "python3").write_text("#!/bin/bash\nexit 0\n")
    (tmp_path / "python3").chmod(0o755)
    option = "--container-image=/an/image" if container else "--mpi=none"
    site = f"SBN_SRUN_OPTIONS=('{option}' '--two words')\nsbn_node_environment() {{ :; }}\n"
    script = f'srun() {{ printf "%s|" "$@" >>{tmp_path}/said; echo >>{tmp_path}/said; }}; '
    (tmp_path / "env.sh").write_text(site + script)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SBN_ENV": f"{tmp_path}/env.sh", "SBN_SUBMITTED_BY": "own"}
    if not container:
        environment["SBN_PYTHON"] = "python3"
    text = SCRIPT.format(code=ROOT, folder=tmp_path)
    subprocess.run(["bash", "-c", text], env=environment, capture_output=True, timeout=LIMIT_SECONDS, check=True)
    said = (tmp_path / "said").read_text().splitlines()
    begin, node, end = said if container else ["", *said, ""]
    assert f"|{option}|--two words|python3|-m|megatron_sbn.cluster|node|recipe.yaml|" in node
    if container:  # what decides is in it too
        words = f"--ntasks=1|--quiet|{option}|--two words|python3|-m|megatron_sbn.cluster"
        assert f"{words}|begin|" in begin
        assert f"{words}|end|" in end
