"""What a job of a recipe for GPUs gets of a Slurm whose nodes have some: by name, for this machine has none."""

import re

import pytest
from cluster import Cluster
from jobs import write_recipe
from test_submit import sbn, submitted
from time_limit import LIMIT_SECONDS

pytestmark = pytest.mark.slurm
SHOW = 'echo "GPUs of this node: $SLURM_GPUS_ON_NODE, CPUs of its task: $SLURM_CPUS_PER_TASK"'


@pytest.mark.usefixtures("slurm")
def test_a_rank_a_gpu_with_its_cpus(tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path = tmp_path_factory.mktemp("gpus")  # Slurm's sockets have paths of at most 107 characters
    with Cluster(tmp_path / "cluster", gpus=2) as cluster:
        recipe = write_recipe(tmp_path)
        (tmp_path / "env.sh").write_text((tmp_path / "env.sh").read_text() + f"sbn_node_environment() {{ {SHOW}; }}\n")
        words = ["submit", str(recipe), "--nodes", "2", "device=cuda", "run_dir=run", "training.global_batch_size=4"]
        done = sbn(cluster, recipe, *words)
        job = submitted(done)
        assert "ranks: 2 nodes x 2 GPU ranks (device = cuda): one a GPU of 2 on a node" in done.stdout
        assert " on 4 h100 by data sheets (sbn plan), not measured: --time 01:00:00 leaves room" in done.stdout
        fields = cluster.await_end(job, LIMIT_SECONDS)
        said = (tmp_path / "run" / "logs" / f"slurm-{job}.out").read_text()
        assert "GPUs of this node: 2, CPUs of its task: 4" in said
        assert (fields["NumNodes"], fields["NumCPUs"], fields["CPUs/Task"]) == ("2", "8", "4"), fields
        # There is no GPU here: the ranks end at once, and are not started again.
        assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0"), said
        log = (tmp_path / "run" / "logs" / f"sbn-{job}-node-0.log").read_text()
        assert re.search(r"^variables .*CUDA_VISIBLE_DEVICES=0,1( |$)", log, re.MULTILINE), log
        assert "device = cuda: PyTorch finds no GPU here" in log
