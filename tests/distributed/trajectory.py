"""One trajectory, trained on a single rank, that other layouts follow: the same weights before every step.

`lead` writes weights, gradients, losses and norms of every step to a folder; `follow` loads the weights of each step
into another layout, makes the step there, and returns how far its loss, norm, gradients and updated weights are off.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_runs import small_recipe, train_step, trainer_of

from megatron_sbn.doctor.recorder import gradient_shards, weight_shards
from megatron_sbn.training.step import Trainer


@dataclass(frozen=True)
class Offset:
    """Relative differences of one step."""

    loss: float
    grad_norm: float
    gradient: float  # largest difference over the largest magnitude, worst tensor
    weights: float  # norm of the difference over the norm, worst tensor


def lead(overrides: Sequence[str], folder: Path, steps: int) -> None:
    """Trains on this rank alone; FOLDER/step-K.safetensors has weights before step K, and its gradients."""
    results = []
    with trainer_of(small_recipe(overrides)) as trainer:
        gradients = recorded_gradients(trainer)
        for step in range(steps):
            before = {f"weights.{name}": part.value for name, part in weight_shards(trainer).items()}
            result = train_step(trainer, step)
            save_file(
                before | {f"gradients.{name}": value for name, value in gradients.items()},
                folder / f"step-{step}.safetensors",
            )
            results.append([result.loss, result.grad_norm])
        last = {f"weights.{name}": part.value for name, part in weight_shards(trainer).items()}
        save_file(last, folder / f"step-{steps}.safetensors")
    (folder / "results.json").write_text(json.dumps(results))


def follow(overrides: Sequence[str], folder: Path, steps: int) -> list[Offset]:
    """Every step from the leader's weights."""
    led = json.loads((folder / "results.json").read_text())
    offsets = []
    with trainer_of(small_recipe(overrides)) as trainer:
        gradients = recorded_gradients(trainer)
        for step in range(steps):
            reference = load_file(folder / f"step-{step}.safetensors")
            assign(trainer, reference)
            trainer.stages.state.prepare(step)
            result = train_step(trainer, step)
            after = load_file(folder / f"step-{step + 1}.safetensors")
            offsets.append(
                Offset(
                    loss=abs(result.loss - led[step][0]) / led[step][0],
                    grad_norm=abs(result.grad_norm - led[step][1]) / led[step][1],
                    gradient=worst_gradient(trainer, gradients, reference),
                    weights=worst_weights(trainer, after),
                )
            )
    return offsets


def assign(trainer: Trainer, reference: dict[str, Tensor]) -> None:
    """Gives every parameter its shard of the logical weights."""
    for logical in trainer.stages.parameters:
        trainer.zero.assign(logical.parameter, logical.shard.take(reference[f"weights.{logical.name}"]))


def recorded_gradients(trainer: Trainer) -> dict[str, Tensor]:
    """This rank's whole gradients of the latest step, filled by every step."""
    gradients: dict[str, Tensor] = {}
    finalize = trainer.stages.config.finalize_model_grads_func

    def finalize_and_record(*args: Any, **kwargs: Any) -> None:
        finalize(*args, **kwargs)
        gradients.update({name: part.value for name, part in gradient_shards(trainer.stages).items()})

    trainer.stages.config.finalize_model_grads_func = finalize_and_record
    return gradients


def worst_gradient(trainer: Trainer, gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The mean over data parallelism against the leader's, over the magnitude of the whole logical gradient."""
    worst = 0.0
    for logical in trainer.stages.parameters:
        gradient = gradients[logical.name].clone()
        dist.all_reduce(gradient, group=trainer.parallel.data.group)
        whole = reference[f"gradients.{logical.name}"]
        difference = (gradient / trainer.parallel.data.size - logical.shard.take(whole)).abs().max()
        worst = max(worst, float(difference / whole.abs().max()))
    return worst


def worst_weights(trainer: Trainer, after: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, of this rank's shards."""
    worst = 0.0
    for name, part in weight_shards(trainer).items():
        expected = part.shard.take(after[f"weights.{name}"])
        worst = max(worst, float((part.value - expected).norm() / expected.norm()))
    return worst


def largest(ranks: Sequence[Sequence[Offset]]) -> Offset:
    """The largest of each over ranks and steps."""
    every = [offset for rank in ranks for offset in rank]
    return Offset(*(max(getattr(o, field) for o in every) for field in ("loss", "grad_norm", "gradient", "weights")))
