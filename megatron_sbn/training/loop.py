"""The training loop: step, validation, telemetry, checkpoint, in this order, until `training.steps`.

Steps are counted by what is done: step 1 is the first update, and checkpoint step-00000100 holds the state after the
100th. The batch of a step depends on the seed and the step alone, so a resumed run sees what it would have seen.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_sbn.config import Recipe
from megatron_sbn.data.dataset import batch, build_dataset
from megatron_sbn.errors import STOPPED
from megatron_sbn.experiments.flops import model_flops_per_token
from megatron_sbn.experiments.metrics import MetricsFile
from megatron_sbn.experiments.provenance import batch_scripts, installed_packages
from megatron_sbn.experiments.telemetry import Telemetry
from megatron_sbn.experiments.tracking import Tracker, default_uri, describe_environment, describe_recipe
from megatron_sbn.model import build_stages
from megatron_sbn.parallel import state as parallel_state
from megatron_sbn.parallel.cpu import without_cuda
from megatron_sbn.parallel.state import ParallelState
from megatron_sbn.parallel.traffic import Totals, Traffic, group_names, step_metrics
from megatron_sbn.staging import write_whole
from megatron_sbn.training import checkpoint, screen
from megatron_sbn.training.console import Console
from megatron_sbn.training.evaluate import Evaluator
from megatron_sbn.training.run_folder import RunFolder, open_run_folder, recorded
from megatron_sbn.training.signals import Reason, StopRequest, listening
from megatron_sbn.training.step import StepResult, Trainer


def run(recipe: Recipe) -> int:
    """Trains a recipe on this rank, from its start or its last checkpoint.

    Returns 0, or 75 (errors.STOPPED) where it was asked to stop (`signals.py`) and is checkpointed.
    """
    with without_cuda():
        parallel = parallel_state.initialize(recipe)
        with open_run_folder(recipe, parallel) as folder:
            request = StopRequest(folder.path, parallel)
            with recorded(folder, parallel), listening(request, recipe.checkpoint.signal_deadline):
                reason = Loop(recipe, parallel, folder).run(request)
        parallel_state.finalize()
    return STOPPED if reason else 0


EndStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass
class Ending:
    """How a run ended, in MLflow's words."""

    status: EndStatus = "FINISHED"


class Loop:
    """One run on one rank."""

    def __init__(self, recipe: Recipe, parallel: ParallelState, folder: RunFolder) -> None:
        self.recipe = recipe
        self.parallel = parallel
        shards = [(shard.path, shard.weight) for shard in recipe.data.train]
        self.dataset = build_dataset(shards, recipe.model.seq_length, recipe.training.seed)
        self.evaluator = Evaluator(recipe, parallel) if recipe.data.validation is not None else None
        self.folder = folder
        stages = build_stages(recipe, parallel)
        self.trainer = Trainer(recipe, parallel, stages)
        self.telemetry = Telemetry(stages.state, parallel)
        self.traffic = Traffic(group_names(parallel))
        self.sent: Totals = {}  # by the last step
        self.first = self._resume() if self.folder.resume_from else 0
        self.saved = self.first  # the step of the last checkpoint
        stages.state.prepare(self.first)
        self.metrics = MetricsFile(self.folder.metrics) if parallel.rank == 0 else None
        if self.metrics is not None:
            # A start anew measures step 0 again.
            self.metrics.truncate_after(self.first if self.folder.resume_from else -1)

    @property
    def layout(self) -> checkpoint.Layout:
        """What a checkpoint can be resumed at."""
        parallel = self.recipe.parallel
        return checkpoint.Layout(
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            data=self.parallel.data_size,
            virtual_pipeline=parallel.virtual_pipeline or 1,
            zero_stage=parallel.zero_stage,
            expert=parallel.expert,
        )

    def run(self, request: StopRequest) -> Reason:
        """All steps that are left, or until the ranks agree that they were asked to stop; returns why."""
        training = self.recipe.training
        console = Console(self.folder.log, self.first, training.steps, self.parallel.rank == 0)
        kernels = self.trainer.stages.state.kernels()
        console.say("\n".join(screen.opening(self.recipe, self.parallel, self.folder, self.first, kernels)))
        pace = screen.Pace(self.first, training.steps)
        reason = Reason.NONE
        with self._tracked() as ending, self.traffic:
            if self.first == 0:
                self._measure(console, 0)
            for step in range(self.first, training.steps):
                reason = request.agreed()
                if reason:
                    self._stop(console, step, reason)
                    ending.status = "KILLED"
                    break
                result, seconds = self._step(step)
                self._after_step(console, step + 1, result, seconds)
                expected = pace.note(step + 1, seconds)
                if expected is not None:
                    console.say(expected)
            else:
                self.folder.tell(self.parallel, "FINISHED", 0, training.steps)
        if self.metrics is not None:
            self.metrics.close()
        ended = f"stopped at a request ({reason.name})" if reason else f"done: {training.steps} steps"
        console.say("\n".join(screen.closing(self.recipe, self.folder, ended)))
        console.close()
        return reason

    def _stop(self, console: Console, done: int, reason: Reason) -> None:
        """Saves what is not saved yet, then says so: whoever reads STOPPED may rely on the checkpoint."""
        if done > self.first and self.saved != done:
            console.say(f"step {done}: saved {self._save(done)}")
        self.folder.tell(self.parallel, "STOPPED", STOPPED, done, reason.name)

    def _step(self, step: int) -> tuple[StepResult, float]:
        self.traffic.restart()
        began = time.perf_counter()
        recipe = self.recipe
        samples = batch(
            self.dataset,
            step,
            recipe.training.global_batch_size,
            self.trainer.rows(),
            vocab_size=recipe.model.vocab_size,
        )
        result = self.trainer.step(step, samples)
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        self.sent = self.traffic.totals()
        return result, seconds

    def _after_step(self, console: Console, done: int, result: StepResult, seconds: float) -> None:
        training, last = self.recipe.training, done == self.recipe.training.steps
        tokens_per_second = training.global_batch_size * self.recipe.model.seq_length / seconds
        told = done % training.log_interval == 0 or last
        console.step(done, result, tokens_per_second, told)
        if told:
            dense, sparse = model_flops_per_token(self.recipe, done - 1)
            values = {
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "weight_decay": result.weight_decay,
                "tokens_per_second": tokens_per_second,
                "model_flops_per_second_dense": dense * tokens_per_second,
                "model_flops_per_second_sparse": sparse * tokens_per_second,
            }
            self._record(done, values | step_metrics(self.sent, self.parallel))
        if self.evaluator and training.validation_interval and (done % training.validation_interval == 0 or last):
            values = self.evaluator.run(self.trainer)
            self._record(done, values)
            console.say(f"step {done}: validation perplexity {values['validation_perplexity']:.3f}")
        if training.telemetry_interval and (done % training.telemetry_interval == 0 or last):
            self._measure(console, done)
        if self.recipe.checkpoint.interval and (done % self.recipe.checkpoint.interval == 0 or last):
            path = self._save(done)
            console.say(f"step {done}: saved {path}")

    def _measure(self, console: Console, done: int) -> None:
        if not self.recipe.training.telemetry_interval:
            return
        values = self.telemetry.measure(done)
        self._record(done, values)
        console.say(f"step {done}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def _record(self, done: int, values: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.append(done, values)

    def _save(self, done: int) -> Path:
        self.saved = done
        stages = self.trainer.stages
        weights = self.trainer.weights()
        weights |= {f"masks.{name}": mask for name, mask in stages.state.mask_state().items()}
        weights |= {f"telemetry.{name}": tensor for name, tensor in self.telemetry.state_tensors().items()}
        snapshot = checkpoint.Snapshot(weights, self.trainer.zero.state_tensors())
        return checkpoint.save(
            self.folder.checkpoints, done, self.layout, snapshot, self.parallel, self.recipe.checkpoint.keep
        )

    def _resume(self) -> int:
        """Takes weights, optimizer, masks and telemetry from the checkpoint; returns the steps that were done."""
        assert self.folder.resume_from is not None
        step, snapshot = checkpoint.load(self.folder.resume_from, self.layout, self.parallel)
        stages = self.trainer.stages
        path = self.folder.resume_from
        self.trainer.load_weights(lambda target, name: checkpoint.restore(target, snapshot.weights, name, path))
        self.trainer.zero.load_state_tensors(snapshot.optimizer)
        stages.state.load_mask_state(checkpoint.section(snapshot.weights, "masks."), step)
        self.telemetry.load_state_tensors(checkpoint.section(snapshot.weights, "telemetry."))
        return step

    @contextmanager
    def _tracked(self) -> Iterator["Ending"]:
        """MLflow on rank 0, told truthfully how the run ended: FINISHED unless the body says or raises otherwise."""
        tracker = self._tracker()
        ending = Ending()
        status: EndStatus = "FAILED"
        try:
            yield ending
            status = ending.status
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if tracker is not None:
                tracker.close(status)

    def _tracker(self) -> Tracker | None:
        recipe = self.recipe
        if self.parallel.rank != 0 or not recipe.tracking.enabled:
            return None
        tags = (
            describe_environment()
            | describe_recipe(recipe, self.parallel.world_size)
            | {
                "layout": self.parallel.describe(),
                "run_folder": str(self.folder.path.resolve()),
            }
        )
        write_whole(self.folder.environment, installed_packages().encode())
        return Tracker(
            run_dir=self.folder.path,
            name=self.folder.path.name,
            experiment=recipe.tracking.experiment,
            uri=recipe.tracking.uri or default_uri(self.folder.path.parent),
            params=recipe.flat(),
            tags=tags,
            artifacts=[self.folder.recipe, self.folder.environment, *batch_scripts()],
        )
