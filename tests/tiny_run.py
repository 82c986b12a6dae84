"""A run that trains in seconds, for tests that start processes; and a signal to it while its engines are imported."""

from pathlib import Path

import numpy as np

from megatron_sbn.data.shards import ShardWriter

VOCABULARY = 128
# Found by every Python that has it on its path. deepspeed is imported by ranks, and by no launcher.
_AT_IMPORT = """
import os, signal, subprocess, sys, time
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "deepspeed":
            sys.meta_path.remove(self)
            {action}
if os.environ.get("RANK") in {ranks}:
    sys.meta_path.insert(0, Interrupt())
"""


def write_tiny_recipe(folder: Path, steps: int, tracking: str = "enabled: false") -> Path:
    """FOLDER/tiny.yaml, its tokens and held-out ones: one layer on two tensor-parallel ranks; it saves at its end."""
    generator = np.random.default_rng(0)
    for name in ("tokens", "held-out"):
        writer = ShardWriter(folder / f"{name}.bin", folder / f"{name}.idx", VOCABULARY)
        for _ in range(50):
            writer.add(generator.integers(0, VOCABULARY, 100))
        writer.finish()
    path = folder / "tiny.yaml"
    path.write_text(
        f"""name: tiny
model: {{num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, seq_length: 16,
  vocab_size: {VOCABULARY}, bf16: false}}
parallel: {{tensor: 2}}
data: {{train: '{folder}/tokens'}}
training: {{steps: {steps}, global_batch_size: 2, micro_batch_size: 2, telemetry_interval: 50}}
tracking: {{{tracking}}}
"""
    )
    return path


def at_import(folder: Path, action: str, ranks: tuple[str, ...]) -> Path:
    """A folder for PYTHONPATH that runs `action`, a line of Python, when one of `ranks` begins to import DeepSpeed."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_AT_IMPORT.format(action=action, ranks=ranks))
    return folder
