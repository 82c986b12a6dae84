"""Training runs of a small model under any layout, and what they leave put together again in its logical form.

`train` is the job of a rank: it trains and returns shards. `Run` joins the shards of all ranks, and checks on the way
that ranks which hold the same shard hold the same bits, and that the shards cover each logical tensor exactly.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks
from torch import Tensor

from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.config.validation import validate_world_size
from megatron_sbn.doctor.logical_tensors import TensorShards, assemble
from megatron_sbn.doctor.recorder import gradient_shards, prepared_shards, recorded_hidden_states, weight_shards
from megatron_sbn.doctor.tiny_recipe import batch_of
from megatron_sbn.model import build_model_chunks
from megatron_sbn.parallel import state as parallel_state
from megatron_sbn.parallel.cuda_shim import without_cuda
from megatron_sbn.parallel.replica_check import check_replicas
from megatron_sbn.parallel.shard import is_expert
from megatron_sbn.training.step import StepResult, Trainer

SMALL = Path(__file__).with_name("small.yaml")


def small_recipe(overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of small.yaml with overrides."""
    return load_recipe(SMALL, list(overrides))


@contextmanager
def trainer_of(recipe: Recipe) -> Iterator[Trainer]:
    """A trainer of the recipe on this rank, prepared for step 0; its groups are left afterwards."""
    with without_cuda():
        parallel = parallel_state.initialize(recipe)
        validate_world_size(recipe, parallel.world_size)
        stages = build_model_chunks(recipe, parallel)
        trainer = Trainer(recipe, parallel, stages)
        stages.state.prepare(0)
        yield trainer
        parallel_state.finalize()


def train_step(trainer: Trainer, step: int) -> StepResult:
    """One step on this rank's share of the step's samples."""
    return trainer.step(step, batch_of(trainer.recipe, step)[trainer.rows()])


@dataclass
class RankRun:
    """What one rank saw."""

    data_rank: int
    steps: list[StepResult] = field(default_factory=list)
    weights: list[TensorShards] = field(default_factory=list)  # before every step, and after the last
    gradients: list[TensorShards] = field(
        default_factory=list
    )  # of every step, before ZeRO averages over data parallelism
    prepared: TensorShards = field(default_factory=dict)
    evaluation: float = 0.0
    hidden: TensorShards = field(default_factory=dict)  # into the last norm, at evaluation; on the last stage
    preparations: int = 0


def train(overrides: Sequence[str], steps: int, recorded: int) -> RankRun:
    """Trains on this rank; weights and gradients are kept for the first `recorded` steps."""
    recipe = small_recipe(overrides)
    with trainer_of(recipe) as trainer:
        stages = trainer.stages
        run = RankRun(trainer.parallel.data.rank, prepared=prepared_shards(stages))
        with recorded_hidden_states(trainer) as run.hidden:
            run.evaluation = trainer.evaluate(batch_of(recipe, 99)[trainer.rows()])
        finalize = stages.config.finalize_model_grads_func

        def finalize_and_record(*args: Any, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            if len(run.gradients) < recorded:
                run.gradients.append(gradient_shards(stages))

        stages.config.finalize_model_grads_func = finalize_and_record
        run.weights.append(weight_shards(trainer))
        for step in range(steps):
            run.steps.append(train_step(trainer, step))
            if step < recorded:
                run.weights.append(weight_shards(trainer))
        run.preparations = stages.state.preparations
        with trainer.zero.gathered([p.parameter for p in stages.parameters]):
            check_replicas(stages.parameters, trainer.parallel)
    return run


@dataclass(frozen=True)
class Run:
    """All ranks' runs, joined."""

    ranks: list[RankRun]

    @property
    def losses(self) -> list[float]:
        """Loss of every step; equal on all ranks."""
        return [_same([r.steps[i].loss for r in self.ranks]) for i in range(len(self.ranks[0].steps))]

    @property
    def grad_norms(self) -> list[float]:
        """Gradient norm before clipping of every step; equal on all ranks."""
        return [_same([r.steps[i].grad_norm for r in self.ranks]) for i in range(len(self.ranks[0].steps))]

    @property
    def evaluation(self) -> float:
        """Evaluation loss; equal on all ranks."""
        return _same([r.evaluation for r in self.ranks])

    def weights(self, step: int) -> dict[str, Tensor]:
        """Logical weights after `step` steps."""
        return assemble([rank.weights[step] for rank in self.ranks])

    def hidden(self) -> Tensor:
        """Hidden states before the last norm at step 0, [global batch, tokens, hidden]."""
        return assemble([rank.hidden for rank in self.ranks])["hidden"]

    def prepared(self) -> dict[str, Tensor]:
        """Logical codes, gamma per row and masks at step 0."""
        return assemble([rank.prepared for rank in self.ranks])

    def gradients(self, step: int) -> dict[str, Tensor]:
        """Logical gradients of a step, averaged over data parallelism."""
        replicas = sorted({rank.data_rank for rank in self.ranks})
        dense = [{n: p for n, p in rank.gradients[step].items() if not is_expert(n)} for rank in self.ranks]
        joined = [assemble([d for d, r in zip(dense, self.ranks, strict=True) if r.data_rank == i]) for i in replicas]
        # An expert's replicas are whole, and may be ranks of one data-parallel replica.
        experts: dict[str, list[Tensor]] = {}
        for rank in self.ranks:
            for name in rank.gradients[step]:
                if is_expert(name):
                    experts.setdefault(name, []).append(rank.gradients[step][name].value)
        return {name: torch.stack([j[name] for j in joined]).mean(0) for name in joined[0]} | {
            name: torch.stack(values).mean(0) for name, values in experts.items()
        }


@functools.cache
def run_of(world_size: int, overrides: tuple[str, ...] = (), steps: int = 1, recorded: int = 1) -> Run:
    """Trains once a session for every set of arguments."""
    return Run(run_ranks(train, world_size, overrides, steps, recorded))


def _same(values: list[float]) -> float:
    assert len(set(values)) == 1, f"ranks do not agree: {values}"
    return values[0]
