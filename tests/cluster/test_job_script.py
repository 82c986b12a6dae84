"""slurm/job.sh with stand-ins for srun, scontrol and Python: a signal is remembered whenever it comes."""

import subprocess
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
        if words[:4] == ["python", "-m", "megatron_sbn.cluster.job", "end"]:
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
