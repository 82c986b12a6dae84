"""A machine without a compiler and without a launcher: import, build, ZeRO and a step all work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from time_limit import LIMIT_SECONDS

SCRIPT = """
from training_runs import small_recipe, train_step, trainer_of
with trainer_of(small_recipe(("model.num_layers=1", "parallel.zero_stage=2"))) as trainer:
    print("loss", train_step(trainer, 0).loss)
"""


def test_one_process_trains_without_a_compiler_or_a_launcher(tmp_path: Path) -> None:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CC", "CXX", "SLURM_STEP_ID")
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    environment |= {
        "PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    assert not any(
        shutil.which(name, path=environment["PATH"]) for name in ("cc", "gcc", "g++", "c++", "clang", "ninja")
    )
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("loss 4.8")
    assert not (tmp_path / "extensions").exists()
