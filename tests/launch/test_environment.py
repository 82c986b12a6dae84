"""Ranks as torchrun, srun and plain python tell them, and what is no rank at all inside Slurm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sbn.errors import RecipeError
from megatron_sbn.launch import environment

# What `env` printed in each place under Slurm 22.05.
TASK = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[1-2]",
}  # fmt: skip
BATCH = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SALLOC = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "3"}
INTERACTIVE = TASK | {"SLURM_STEP_ID": str(0xFFFFFFFA)}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in (*TORCHRUN, "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (3, 4, 1)),
        (TASK, (1, 2, 0)),
        (TASK | TORCHRUN, (3, 4, 1)),  # torchrun, or a launcher, under srun
        (BATCH, (0, 1, 0)),
        (SALLOC, (0, 1, 0)),
        (INTERACTIVE, (0, 1, 0)),
    ],
    ids=["plain", "torchrun", "srun", "launcher under srun", "batch script", "salloc", "interactive step"],
)
def test_where_a_process_stands(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[int, int, int]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (environment.rank(), environment.world_size(), environment.local_rank()) == expected


@pytest.mark.parametrize(
    "variables", [{"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "1"}, {"WORLD_SIZE": "0"}, {"RANK": "-1"}]
)
def test_a_rank_outside_the_world_is_one_line(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="contradict each other"):
        environment.world_size()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("gpu[003-005,9],login", "gpu003"), ("a,b", "a"), ("r1n[7,9]-ib", "r1n7-ib")],
)
def test_the_first_of_a_node_list(nodes: str, first: str) -> None:
    assert environment.first_host(nodes) == first


def test_address_and_port_are_the_same_on_every_node_and_others_for_another_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    assert environment.master_address() == "n1"
    port = environment.master_port()
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    assert 15000 <= port < 30000
    assert environment.master_port() != port
    # A job that starts again, for its port may be what was taken.
    monkeypatch.setenv("SLURM_JOB_ID", TASK["SLURM_JOB_ID"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert environment.master_port() != port
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert (environment.master_address(), environment.master_port()) == ("10.0.0.1", 29500)


def test_on_one_node_no_name_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu007")
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    assert environment.master_address() == "127.0.0.1"
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    assert environment.master_address() == "gpu007"


def test_a_recipe_for_the_cpu_hides_gpus_before_torch_is_imported(tmp_path: Path) -> None:
    recipe = tmp_path / "cpu.yaml"
    recipe.write_text(f"extends: {Path(__file__).parents[2]}/recipes/tiny/ternary-8of8.yaml\ndevice: cpu\n")
    code = (
        "import os, sys\n"
        "from megatron_sbn import train, config\n"
        "import megatron_sbn.launch.environment as environment\n"
        "hide = environment.hide_gpus\n"
        "def hide_and_look():\n"
        "    assert 'torch' not in sys.modules\n"
        "    hide()\n"
        "    print(repr(os.environ['CUDA_VISIBLE_DEVICES']))\n"
        "    raise SystemExit(0)\n"
        "environment.hide_gpus = hide_and_look\n"
        f"train.main([{str(recipe)!r}])\n"
    )
    # Rank 1: the data, which is not here, is rank 0's to look at.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0,1", "RANK": "1", "WORLD_SIZE": "2"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == "''\n", run.stderr


def test_without_a_home_the_engines_get_caches_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "MPLCONFIGDIR")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    environment.ensure_caches()
    assert not any(name in os.environ for name in names)
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("TRITON_CACHE_DIR", "own")
    environment.ensure_caches()
    assert os.environ["TRITON_CACHE_DIR"] == "own"
    assert all(os.environ[name] for name in names)
    for name in names[1:]:
        os.environ.pop(name)


def test_usable_cpus_are_those_of_the_process_and_of_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(16)), raising=False)
    for name in environment.SLURM_CPUS:
        monkeypatch.delenv(name, raising=False)
    assert environment.usable_cpus() == 16
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "6")
    assert environment.usable_cpus() == 6
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert environment.usable_cpus() == 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    assert environment.usable_cpus() == 16


def test_threads_of_ranks_are_those_of_the_cpus_that_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "said.py").write_text(
        "import os\nfrom megatron_sbn.launch.stop_signals import unblock\nunblock()\n"
        f"open(f'{tmp_path}/{{os.environ[\"RANK\"]}}', 'w').write(os.environ['OMP_NUM_THREADS'])\n"
    )
    code = "import sys; from megatron_sbn.launch import launch; sys.exit(launch([], 2, module='said'))"
    variables = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONSAFEPATH")}
    variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    first = min(os.sched_getaffinity(0))
    bound = f"import os; os.sched_setaffinity(0, {{{first}}}); os.cpu_count = lambda: 64; {code}"
    done = subprocess.run([sys.executable, "-c", bound], env=variables, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == ["1", "1"]
