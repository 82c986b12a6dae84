"""What `sbn submit` says about time limits."""

from pathlib import Path

import pytest

from megatron_sbn.cli import main
from megatron_sbn.cluster.resources import Place
from megatron_sbn.cluster.site import Nodes, Site
from megatron_sbn.cluster.time_limit import known_device, slurm_time

ROOT = Path(__file__).parents[2]
LARGE = str(ROOT / "recipes" / "qwen2.5-0.5b" / "ternary-6of8.yaml")
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
SCALING = str(ROOT / "recipes" / "sweeps" / "weak-scaling-qwen2.5-0.5b.yaml")
NONE = "time: no --time was given, so the site's default is the limit; "


@pytest.mark.parametrize(
    ("gpu", "options", "nodes", "expected"),
    [
        ("h100", (), None, "h100"),
        ("", ("--gres=gpu:nvidia_h200:8",), None, "h200"),
        ("", ("--gpus-per-node=a100:4",), None, "a100"),
        ("", (), Nodes(8, 64, "nvidia_a100-sxm4-80gb"), "a100"),
        ("", (), Nodes(8, 64, "rtx4090"), None),
        ("", (), None, None),
    ],
)
def test_a_known_device(gpu: str, options: tuple[str, ...], nodes: Nodes | None, expected: str | None) -> None:
    device = known_device(Place(Site(Path("env.sh"), options, gpu=gpu), nodes))
    assert (device.name if device is not None else None) == expected


def test_times_as_sbatch_takes_them() -> None:
    assert [slurm_time(hours * 3600 + 1) for hours in (0, 22, 29)] == ["01:00:00", "23:00:00", "1-06:00:00"]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main([*words]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("time: ")]


def test_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SBN_ENV", str(tmp_path / "env.sh"))
    (tmp_path / "env.sh").write_text("")
    assert said(capsys, "submit", QUICKSTART, "--dry-run") == [f"{NONE}a job starts again at its limit"]
    assert said(capsys, "submit", QUICKSTART, "--time", "1:00:00", "--dry-run") == []
    assert said(capsys, "submit", QUICKSTART, "--dry-run", "--", "--time=1:00:00") == []
    (tmp_path / "env.sh").write_text("SBN_GPUS_PER_NODE=8 SBN_GPU=h100\n")
    (line,) = said(capsys, "submit", LARGE, "--nodes", "2", "--dry-run")
    assert line.startswith(NONE)
    assert " on 16 h100 by data sheets (sbn plan), not measured: --time " in line
    assert line.endswith(" leaves room")
    (given,) = said(capsys, "submit", LARGE, "--nodes", "2", "--time", "1:00:00", "--dry-run")
    assert given.endswith("(sbn plan), not measured; a job starts again at its limit")
    (array,) = said(capsys, "sweep", "submit", SCALING, "--dry-run")
    (series,) = said(capsys, "sweep", "submit", SCALING, "--one-job", "--dry-run")
    assert "h100 by data sheets" in array
    assert "on 64 h100" in series
