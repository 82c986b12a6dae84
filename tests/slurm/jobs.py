"""What the tests run on their Slurm: a recipe that trains in a second, and a site file for it."""

import sys
from pathlib import Path

from tiny_run import write_tiny_recipe

ROOT = Path(__file__).parents[2]
STEPS = 200


def write_recipe(folder: Path, python: str = f"SBN_PYTHON={sys.executable}") -> Path:
    """FOLDER/tiny.yaml with its tokens, and FOLDER/env.sh: two ranks, one a node; `python` names the nodes' Python."""
    (folder / "env.sh").write_text(
        f"{(ROOT / 'slurm' / 'env.sh').read_text()}\n{python}\n"
        "export MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=1 SBN_NPROC_PER_NODE=${SBN_NPROC_PER_NODE:-1}\n"
    )
    return write_tiny_recipe(folder, STEPS)
