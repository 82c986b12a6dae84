"""Ranks, GPUs and CPUs that a job gets where nobody says, by recipe and site."""

from pathlib import Path

import pytest

from megatron_sbn.cli import main
from megatron_sbn.cluster import job
from megatron_sbn.cluster.resources import Place, asked_of_slurm, choose_ranks
from megatron_sbn.cluster.site import Nodes, Site, gpus_in, nodes_of, read_site
from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.errors import InputError, RecipeError

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
LARGE = str(ROOT / "recipes" / "qwen2.5-3b" / "ternary-6of8.yaml")
NOBODY = Place(Site(Path("env.sh"), ()), None)


def recipe(path: str, *overrides: str) -> Recipe:
    return load_recipe(path, list(overrides))


def site(*options: str, gpus: int | None = None, cpus: int | None = None, nodes: Nodes | None = None) -> Place:
    return Place(Site(Path("env.sh"), options, gpus, cpus), nodes)


@pytest.mark.parametrize(
    ("place", "device", "ranks", "asked", "said"),
    [
        # Where the GPUs of a node are known, all of them.
        (site(gpus=8), "cuda", 8, ("--gpus-per-node=8", "--cpus-per-task=64"), "one a GPU of 8 on a node"),
        (site(nodes=Nodes(4, 24)), "cuda", 4, ("--gpus-per-node=4", "--cpus-per-task=24"), "2 nodes x 4 GPU ranks"),
        (site("--gres=gpu:h100:8"), "cuda", 8, ("--cpus-per-task=64",), "one a GPU of 8"),
        (site("--gpus-per-node=h100:4", "--cpus-per-gpu=9"), "auto", 4, (), "(device = auto)"),
        (site(gpus=8, nodes=Nodes(0, 64)), "auto", 8, ("--gpus-per-node=8", "--cpus-per-task=64"), "one a GPU of 8"),
        # 512 sequences are no multiple of 7 replicas of 2 ranks' micro-batches.
        (site(gpus=7), "cuda", 4, ("--gpus-per-node=4", "--cpus-per-task=32"), "one a GPU of 7 on a node"),
        (NOBODY, "cuda", 1, ("--gpus-per-node=1", "--cpus-per-task=8"), "the GPUs of a node are not known"),
        # On CPUs, or told so, one replica over the nodes, and no GPU.
        (site(gpus=8, cpus=3), "cpu", 1, ("--cpus-per-task=3",), "2 nodes x 1 CPU rank (device = cpu)"),
        (site(nodes=Nodes(8, 2)), "cpu", 1, ("--cpus-per-task=2",), "one replica of the model over the nodes"),
        (site("--exclusive"), "cpu", 1, (), "--nproc-per-node G changes it"),
    ],
)
def test_what_a_job_of_two_nodes_gets(place: Place, device: str, ranks: int, asked: tuple[str, ...], said: str) -> None:
    own = recipe(LARGE, f"device={device}")
    chosen, line = choose_ranks(own, 2, None, place)
    assert chosen == ranks
    assert said in line
    assert "\n" not in line
    assert asked_of_slurm([own], chosen, place) == asked


def test_ranks_that_are_given_are_taken_and_checked() -> None:
    assert choose_ranks(recipe(LARGE), 2, 4, site(gpus=8)) == (
        4, "2 nodes x 4 GPU ranks (device = cuda): as --nproc-per-node says",
    )  # fmt: skip
    with pytest.raises(RecipeError, match="needs a multiple of 2 ranks, and 3 were started"):
        choose_ranks(recipe(LARGE), 1, 3, site(gpus=8))


def test_a_large_model_trains_on_cpus_only_if_that_is_meant() -> None:
    message = r"device = auto: .*B parameters would train on CPUs, .* set device=cuda, or device=cpu if that is meant"
    for place in (NOBODY, site(gpus=0), site(nodes=Nodes(0, 64))):
        with pytest.raises(RecipeError, match=message):
            choose_ranks(recipe(LARGE, "device=auto"), 2, None, place)
    assert choose_ranks(recipe(LARGE, "device=cpu"), 2, None, NOBODY)[0] == 1
    assert choose_ranks(recipe(QUICKSTART, "device=auto"), 1, None, NOBODY)[0] == 2
    assert {recipe(str(path)).device for path in (ROOT / "recipes").glob("qwen2.5-*/*.yaml")} == {"cuda"}


def test_a_site_file(tmp_path: Path) -> None:
    file = tmp_path / "env.sh"
    file.write_text('SBN_GPUS_PER_NODE=4\nSBN_GPU=h100\nSBN_SBATCH_OPTIONS=(--x="$SBN_NODES:$SBN_NPROC_PER_NODE")\n')
    assert read_site(file, 2, 8) == Site(file, ("--x=2:8",), 4, None, "h100")
    file.write_text("SBN_CPUS_PER_RANK=many\n")
    with pytest.raises(InputError, match="SBN_CPUS_PER_RANK = 'many' is not a number"):
        read_site(file, 1)


def test_what_sinfo_says_of_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    lines = {"cpu*": ("64", "(null)"), "gpu": ("96+", "gpu:h100:8(S:0-1),nvme:1")}
    text = "".join(f'case "$*" in *=gpu|*G) echo "{n}|{c}|{g}";; esac\n' for n, (c, g) in lines.items())
    (tmp_path / "sinfo").write_text(f"#!/bin/bash\n{text}")
    (tmp_path / "sinfo").chmod(0o755)
    assert nodes_of([]) == Nodes(0, 64)
    assert nodes_of(["-p", "gpu"]) == Nodes(8, 96, "h100")
    assert nodes_of(["--partition=gpu"]) == Nodes(8, 96, "h100")
    assert [gpus_in(text) for text in ("gpu:2", "gpu:a100:4,gpu:t4:1", "(null)")] == [(2, ""), (5, ""), (0, "")]
    (tmp_path / "sinfo").write_text("#!/bin/bash\necho 'sinfo: error' >&2; exit 1\n")
    assert nodes_of([]) is None


def test_the_command_says_what_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "env.sh").write_text("SBN_GPUS_PER_NODE=8\n")
    monkeypatch.setenv("SBN_ENV", str(tmp_path / "env.sh"))
    monkeypatch.chdir(tmp_path)
    assert main(["submit", LARGE, "--nodes", "2", "--dry-run"]) == 0
    said = capsys.readouterr().out
    line = "ranks: 2 nodes x 8 GPU ranks (device = cuda): one a GPU of 8 on a node; --nproc-per-node G changes it"
    assert f"\n{line}\n" in said
    assert "    #SBATCH --gpus-per-node=8\n    #SBATCH --cpus-per-task=64\n" in said
    assert "set -- --nproc-per-node 8 " in said


@pytest.mark.parametrize(("device", "expected"), [("cpu", 2), ("auto", 4), ("cuda", 4)])
def test_a_job_by_hand_starts_a_rank_a_gpu_unless_it_is_for_cpus(
    device: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.delenv("SBN_NPROC_PER_NODE", raising=False)
    started: list[int] = []

    def start(_words: list[str], ranks: int, **_: object) -> int:
        started.append(ranks)
        return 0

    monkeypatch.setattr(job, "launch", start)
    assert job.main(["node", QUICKSTART, f"run_dir={tmp_path}", f"device={device}"]) == 0
    assert started == [expected]


def test_options_after_two_dashes_are_those_of_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["submit", QUICKSTART, "--time", "1:00:00", "training.steps=9", "--dry-run", "--"]
    assert main([*words, "-p", "big", "--comment=two words", "--gres=gpu:4", "--time=2:00:00"]) == 0
    script = [line.strip() for line in capsys.readouterr().out.splitlines()]
    last = [line for line in script if line.startswith("#SBATCH")][-1]
    assert last == "#SBATCH -p big '--comment=two words' --gres=gpu:4 --time=2:00:00"
    assert script.index("#SBATCH --time=1:00:00") < script.index(last)
    assert not any("--gpus-per-node" in line for line in script)
    sweep = str(ROOT / "recipes" / "sweeps" / "n-of-8-tiny.yaml")
    assert main(["sweep", "submit", sweep, "--dry-run", "--", "--exclusive"]) == 0
    assert "    #SBATCH --exclusive\n" in capsys.readouterr().out
    for option in ("--nodes=3", "-N3", "--array=1-2"):
        assert main([*words, option]) == 2
        assert f"-- {option}: is not passed on to sbatch; give --nodes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["submit", QUICKSTART, "nonsense", "--exclusive"])
    assert "unknown: --exclusive" in capsys.readouterr().err
