"""Checkpoints of the small model, as the loop makes them; a run's state as DeepSpeed's own functions give it."""

from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from training_runs import train_step

from megatron_sbn.doctor.logical_tensors import TensorShard, TensorShards
from megatron_sbn.doctor.recorder import weight_shards
from megatron_sbn.runs.folder import RunFolder
from megatron_sbn.telemetry.mask_statistics import Telemetry
from megatron_sbn.training.checkpoint_manager import CheckpointManager
from megatron_sbn.training.step import Trainer

FAST = ("optimizer.lr=3e-2", "optimizer.min_lr=1e-2")


class Run:
    """A trainer with telemetry and checkpoints in `folder`/checkpoints; `said` is what it printed."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer = trainer
        self.telemetry = Telemetry(trainer.stages.state, trainer.parallel)
        self.said: list[str] = []
        self.checkpoints = CheckpointManager(
            trainer.recipe, trainer.parallel, RunFolder(folder, True), trainer, self.telemetry, self.said.append
        )

    def train(self, first: int, last: int) -> list[float]:
        """Losses of steps, with telemetry after each."""
        losses = []
        for step in range(first, last):
            losses.append(train_step(self.trainer, step).loss)
            self.telemetry.measure(step + 1)
        return losses

    def save(self, step: int) -> None:
        """Saves and waits for it."""
        self.checkpoints.save(step, step, None)
        self.checkpoints.saver.finish()

    def restore(self) -> int:
        """Continues from the newest whole checkpoint; returns its step."""
        return self.checkpoints.restore().step


def whole_state(trainer: Trainer) -> TensorShards:
    """Weights, masters and moments of this rank's parameters, whole over data parallelism; counts of Adam too."""
    shards = weight_shards(trainer)
    if trainer.zero.updates and trainer.zero.stage < 3:
        for engine in trainer.zero._engines.values():
            engine.optimizer._hp_optimizer_states_linked = False  # done too early, after the first group's first step
            engine.optimizer._lazy_init_hp_params_optimizer_state()
    for logical in trainer.stages.parameters:
        values = {"master": safe_get_full_fp32_param(logical.parameter)}
        if trainer.zero.updates:
            for key in ("exp_avg", "exp_avg_sq"):
                values[key] = safe_get_full_optimizer_state(logical.parameter, key)
        for key, value in values.items():
            local = value.detach().clone().view(shards[logical.name].value.shape)
            shards[f"{key}.{logical.name}"] = TensorShard(logical.shard, local, logical.counts)
    return shards


def derived(trainer: Trainer, telemetry: Telemetry) -> dict[str, torch.Tensor]:
    """What is made from the state, or kept beside it: codes, masks in force, masks of the last measurement."""
    state = trainer.stages.state
    made = {f"kept.{name}": mask.clone() for name, mask in state.kept_masks().items()}
    made |= {f"measured.{name}": mask for name, mask in telemetry.references().items()}
    for name, layer in state.layers.items():
        prepared = layer.prepared.codes if layer.prepared.codes is not None else layer.prepared.mask
        assert prepared is not None
        made[f"prepared.{name}"] = prepared.clone()
    return made
