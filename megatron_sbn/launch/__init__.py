"""Ranks of one machine: how they are started, what a launcher says to them, how they are asked to stop. No torch."""

from megatron_sbn.launch.local import Machines, launch

__all__ = ["Machines", "launch"]
