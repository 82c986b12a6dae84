"""What the tests run on their Slurm: a recipe that trains in a second, and a site file for it."""

import sys
from pathlib import Path

import numpy as np

from megatron_sbn.data.shards import ShardWriter

ROOT = Path(__file__).parents[2]
VOCABULARY, STEPS = 128, 400


def write_recipe(folder: Path) -> Path:
    """FOLDER/tiny.yaml with its tokens, and FOLDER/env.sh: two ranks, one a node."""
    writer = ShardWriter(folder / "tokens.bin", folder / "tokens.idx", VOCABULARY)
    generator = np.random.default_rng(0)
    for _ in range(50):
        writer.add(generator.integers(0, VOCABULARY, 100))
    writer.finish()
    (folder / "env.sh").write_text(
        f"{(ROOT / 'slurm' / 'env.sh').read_text()}\nSBN_PYTHON={sys.executable}\n"
        "export MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=1 SBN_NPROC_PER_NODE=${SBN_NPROC_PER_NODE:-1}\n"
    )
    path = folder / "tiny.yaml"
    path.write_text(
        f"""name: tiny
model: {{num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, seq_length: 16,
  vocab_size: {VOCABULARY}, bf16: false}}
parallel: {{tensor: 2}}
data: {{train: {folder}/tokens}}
training: {{steps: {STEPS}, global_batch_size: 2, micro_batch_size: 2, telemetry_interval: 50}}
tracking: {{enabled: false}}
"""
    )
    return path
