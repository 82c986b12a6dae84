"""What is said of a machine; without the tools that say it, too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from time_limit import LIMIT_SECONDS

from megatron_sbn.cli import main
from megatron_sbn.cluster import job, machine
from megatron_sbn.cluster.machine import describe

QUICKSTART = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")
NAMES = "host CPUs memory GPUs driver NCCL engines Python network InfiniBand disk /dev/shm variables".split()


def rows(folder: Path) -> dict[str, str]:
    return {line[:10].strip(): line[12:] for line in describe(folder)}


def tool(folder: Path, text: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/bash\n{text}\n")
    (folder / "nvidia-smi").chmod(0o755)


def test_a_machine_with_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    tool(tmp_path, "for _ in {1..8}; do echo 'NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15'; done")
    for name, text in (("state", "4: ACTIVE\n"), ("rate", "400 Gb/sec (4X NDR)\n")):
        port = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1"
        port.mkdir(parents=True, exist_ok=True)
        (port / name).write_text(text)
    monkeypatch.setattr(machine, "_INFINIBAND", tmp_path / "infiniband")
    said = rows(tmp_path / "not" / "there")
    assert list(said) == NAMES
    assert said["GPUs"] == "8 x NVIDIA H100 80GB HBM3, 81559 MiB"
    assert said["driver"] == "550.54.15"
    assert said["InfiniBand"] == "mlx5_0 ACTIVE 400 Gb/sec (4X NDR)"
    assert "NCCL_DEBUG=WARN" in said["variables"]
    assert said["disk"].endswith(f"in {tmp_path / 'not' / 'there'}")
    assert "GiB free of " in said["disk"]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (None, "not found (no nvidia-smi)"),
        ("echo 'NVIDIA-SMI has failed' ; exit 9", "not found (nvidia-smi: NVIDIA-SMI has failed)"),
        ("exec sleep 60", "not found (nvidia-smi does not answer)"),
    ],
)
def test_what_is_missing_is_no_error(
    script: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(machine, "SMI_SECONDS", 0.2 if script == "exec sleep 60" else 20.0)
    monkeypatch.setattr(machine, "_INFINIBAND", tmp_path / "none")
    if script is not None:
        tool(tmp_path, script)
    said = rows(tmp_path)
    assert (said["GPUs"], said["driver"], said["InfiniBand"]) == (expected, "not found", "not found")


def test_the_command_needs_no_recipe_and_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from megatron_sbn.cli import main\n"
        "sys.exit(main(['doctor', '--machine']) or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True
    )
    assert [line[:10].strip() for line in done.stdout.splitlines()] == NAMES
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == (
        "sbn: sbn doctor: give a RECIPE to check, or --machine to see what this machine has\n"
    )


def test_a_nodes_log_begins_with_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "launch", lambda *_, **__: 0)
    assert job.main(["node", QUICKSTART, f"run_dir={tmp_path}"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("job ")
    assert [line[:10].strip() for line in lines] == NAMES


def test_the_site_files_defaults_give_way(tmp_path: Path) -> None:
    site = Path(__file__).parents[2] / "slurm" / "env.sh"
    command = f"source {site}; sbn_node_environment; echo $NCCL_DEBUG $NCCL_IB_TIMEOUT"
    for variables, expected in (({}, "WARN 22"), ({"NCCL_DEBUG": "INFO", "NCCL_IB_TIMEOUT": "5"}, "INFO 5")):
        environment = {"PATH": os.environ["PATH"]} | variables
        said = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
        assert said.stdout.split() == expected.split()
