"""DeepSpeed ZeRO: the only folder that imports deepspeed."""

import os

import torch

# Said before deepspeed is imported, or it warns that it found no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from megatron_sbn.parallel.zero.engine import ZeroOptimizer
from megatron_sbn.parallel.zero.fragments import MASTER, MOMENTS, Fragment
from megatron_sbn.parallel.zero.sharded_weight import Zero3Weight

__all__ = ["MASTER", "MOMENTS", "Fragment", "Zero3Weight", "ZeroOptimizer"]
