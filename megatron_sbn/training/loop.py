"""The training loop: step, validation, telemetry, checkpoint, in this order, until `training.steps`.

Steps are counted by what is done: step 1 is the first update, and checkpoint step-00000100 holds the state after the
100th. The batch of a step depends on the seed and the step alone, so a resumed run sees what it would have seen.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import Signals
from typing import Literal

import torch

from megatron_sbn.checkpoint.directory import saved_step
from megatron_sbn.config import Recipe
from megatron_sbn.data.dataset import batch, build_dataset
from megatron_sbn.errors import STOPPED, CheckpointError, NumericalError
from megatron_sbn.launch.stop_signals import StopSignals
from megatron_sbn.model import build_model_chunks
from megatron_sbn.parallel import state as parallel_state
from megatron_sbn.parallel.comm_counter import CommCounter, Totals, group_names, step_metrics
from megatron_sbn.parallel.cuda_shim import without_cuda
from megatron_sbn.parallel.state import ParallelState
from megatron_sbn.plan.flops import model_flops_per_token
from megatron_sbn.plan.hardware import known_device
from megatron_sbn.runs.folder import PROFILE, RunFolder
from megatron_sbn.runs.metrics_file import MetricsFile
from megatron_sbn.runs.system_metrics import sampled
from megatron_sbn.telemetry.mask_statistics import Telemetry
from megatron_sbn.tracking.tracker import Tracker
from megatron_sbn.training import run_summary
from megatron_sbn.training.bad_steps import BadStepError
from megatron_sbn.training.checkpoint_manager import CheckpointManager
from megatron_sbn.training.console import Console
from megatron_sbn.training.evaluate import Evaluator
from megatron_sbn.training.heartbeat import Heartbeat, name_lost_rank
from megatron_sbn.training.profiling import Profiler
from megatron_sbn.training.run_folder import open_run_folder, recorded, tell
from megatron_sbn.training.run_tracking import start_tracker
from megatron_sbn.training.step import StepResult, Trainer
from megatron_sbn.training.stop_request import Reason, StopRequest, check_before_first_step
from megatron_sbn.training.stragglers import Stragglers


def run(recipe: Recipe, signals: StopSignals) -> int:
    """Trains a recipe on this rank, from its start or its last checkpoint.

    Returns 0, or 75 (errors.STOPPED) where it was asked to stop (`stop_request.py`) and what it did is checkpointed.
    """
    with without_cuda():
        parallel = parallel_state.initialize(recipe, lambda: check_before_first_step(signals))
        with open_run_folder(recipe, parallel) as folder:
            request = StopRequest(folder.path, parallel, signals, recipe.training.time_limit)
            heart = _heartbeat(recipe, parallel, folder)
            signals.before_exit = lambda number: tell(
                *(folder, parallel, "FAILED", 128 + number, saved_step(folder.path)),
                f"ended at once by {Signals(number).name}, nothing was saved at that moment",
            )
            with recorded(folder, parallel), heart, name_lost_rank(heart, parallel.world_size):
                reason = Loop(recipe, parallel, folder, heart).run(request)
        parallel_state.finalize()
    return STOPPED if reason else 0


def _heartbeat(recipe: Recipe, parallel: ParallelState, folder: RunFolder) -> Heartbeat:
    """What it says goes to standard error, and from rank 0 to the log too: a hang may hold the console's own lock."""

    def say(line: str) -> None:
        print(f"sbn: {line}", file=sys.stderr, flush=True)
        if parallel.rank == 0:
            with folder.log.open("a", encoding="utf-8") as log:
                log.write(f"{line}\n")

    training = recipe.training
    return Heartbeat(
        folder.path,
        parallel.rank,
        parallel.world_size,
        training.hang_warning,
        training.hang_timeout,
        say,
        lambda why: tell(folder, parallel, "FAILED", 1, saved_step(folder.path), why),
    )


def _peak_flops(parallel: ParallelState) -> float | None:
    """bf16 FLOP/s of all ranks' devices together, by the data sheet; None where the device is not known."""
    if parallel.device.type != "cuda":
        return None
    device = known_device(torch.cuda.get_device_name(parallel.device))
    return None if device is None else device.bf16 * parallel.world_size


EndStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass
class Ending:
    """How a run ended, in MLflow's words."""

    status: EndStatus = "FINISHED"


@dataclass(frozen=True)
class Periodic:
    """What happens every `interval` steps (0: at none), and after the last step where `after_last` says so.

    Attributes:
        phase: its name for the heartbeat.
        action: called with the number of steps that are done.
    """

    phase: str
    interval: int
    action: Callable[[int], None]
    after_last: bool

    def is_due(self, done: int, last: bool) -> bool:
        """Whether it happens after `done` steps; `last` says whether none follows."""
        return (self.interval > 0 and done % self.interval == 0) or (last and self.after_last)


class Loop:
    """One run on one rank."""

    def __init__(self, recipe: Recipe, parallel: ParallelState, folder: RunFolder, heart: Heartbeat) -> None:
        self.recipe = recipe
        self.heart = heart
        self.parallel = parallel
        shards = [(shard.path, shard.weight) for shard in recipe.data.train]
        self.dataset = build_dataset(shards, recipe.model.seq_length, recipe.training.seed)
        self.evaluator = Evaluator(recipe, parallel) if recipe.data.validation is not None else None
        self.folder = folder
        stages = build_model_chunks(recipe, parallel)
        self.trainer = Trainer(recipe, parallel, stages, heart.tick)
        self.telemetry = Telemetry(stages.state, parallel)
        self.traffic = CommCounter(group_names(parallel))
        self.comm_totals: Totals = {}  # by the last step
        self.tracker: Tracker | None = None
        self.console = Console(folder.log, recipe.training.steps, parallel.rank == 0)
        self.stragglers = Stragglers(parallel, self.console.say)
        self.checkpoints = CheckpointManager(recipe, parallel, folder, self.trainer, self.telemetry, self.console.say)
        self.first = self.batches = self.bad_steps = 0
        self.profiler = Profiler(recipe.training.profile, folder.path / PROFILE, parallel.rank)
        self.peak = _peak_flops(parallel)
        self.run_id: str | None = None  # in MLflow, as the checkpoint knows it
        if folder.continues:
            state = self.checkpoints.restore()
            self.first, self.batches, self.bad_steps = state.step, state.data.batches, state.bad_steps
            self.run_id = state.run_id
        elif folder.start_from is not None:
            state = self.checkpoints.branch(folder.start_from, recipe.start_with == "weights")
            if recipe.start_with == "everything":
                self.first, self.batches, self.bad_steps = state.step, state.data.batches, state.bad_steps
        else:
            stages.state.prepare(0)
        self.periodic = self._periodic()
        self.metrics = MetricsFile(self.folder.metrics) if parallel.rank == 0 else None
        if self.metrics is not None:
            self.metrics.truncate_after(self.first if folder.continues else -1)  # a start anew measures step 0 again

    def run(self, request: StopRequest) -> Reason:
        """All steps that are left, or until the ranks agree that they were asked to stop; returns why."""
        training = self.recipe.training
        console = self.console
        kernels = self.trainer.stages.state.kernels()
        console.say(
            "\n".join(run_summary.startup_summary(self.recipe, self.parallel, self.folder, self.first, kernels))
        )
        console.begin(self.first)
        reason = Reason.NONE
        with self._tracked() as ending, self.traffic:
            if self.first == 0 and training.telemetry_interval:
                self.heart.enter("telemetry", 0)
                self._measure(0)
            step = self.first
            while step < training.steps:
                self.heart.enter("agreeing to go on", step)
                self.checkpoints.saver.poll()
                reason = request.agreed()
                if reason:
                    self._stop(step, reason)
                    ending.status = "KILLED"
                    break
                self._say_phase(step)
                self.profiler.before(step)
                try:
                    result, seconds = self._step(step)
                except BadStepError as error:
                    step = self._after_bad_step(step, error)
                    continue
                step += 1
                self._say_profile(self.profiler.after(step))
                self._after_step(step, result, seconds)
            else:
                self.checkpoints.saver.finish()
                tell(self.folder, self.parallel, "FINISHED", 0, training.steps)
        self._say_profile(self.profiler.close(step))
        if self.metrics is not None:
            self.metrics.close()
        ended = f"stopped at a request ({reason.name})" if reason else f"done: {training.steps} steps"
        console.say("\n".join(run_summary.shutdown_summary(self.recipe, self.folder, ended, self.evaluator)))
        console.close()
        return reason

    def _say_profile(self, path: str | None) -> None:
        if path is not None:
            self.console.say(f"profile: {path} (open it in ui.perfetto.dev or chrome://tracing)")

    def _say_phase(self, step: int) -> None:
        if any(phase.step == step for phase in self.recipe.linear.phases):
            now = self.recipe.linear.at(step)
            bits = now.activation_bits or "no"
            self.console.say(f"step {step + 1}: a phase begins: {now.label}, {bits}-bit activations (linear.phases)")

    def _stop(self, done: int, reason: Reason) -> None:
        """Saves what is not saved yet, then says so: whoever reads STOPPED may rely on the checkpoint."""
        saver = self.checkpoints.saver
        saver.finish()
        if done > self.first and saver.published != done:
            self.heart.enter("saving", done)
            self._save(done)
            saver.finish()
            if saver.published != done:
                raise CheckpointError(
                    f"{self.folder.path}: asked to stop at step {done}, which cannot be saved; see the log"
                )
        tell(self.folder, self.parallel, "STOPPED", STOPPED, done, reason.name)

    def _step(self, step: int) -> tuple[StepResult, float]:
        self.heart.enter("reading a batch", step + 1)
        self.traffic.restart()
        began = time.perf_counter()
        recipe = self.recipe
        samples = batch(
            self.dataset,
            self.batches,
            recipe.training.global_batch_size,
            self.trainer.rows(),
            vocab_size=recipe.model.vocab_size,
        )
        self.stragglers.read(time.perf_counter() - began)
        self.batches += 1
        self.heart.enter("forward, backward and update", step + 1)
        result = self.trainer.step(step, samples)
        if self.parallel.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        self.comm_totals = self.traffic.totals()
        return result, seconds

    def _after_bad_step(self, step: int, error: BadStepError) -> int:
        """Gives up the batch of a refused step; returns how many steps are done then. Raises where the run stops."""
        training = self.recipe.training
        self.bad_steps += 1
        if training.on_bad_step == "stop":
            self.checkpoints.saver.finish()
            raise error
        if self.bad_steps > training.bad_step_budget:
            self.checkpoints.saver.finish()
            raise NumericalError(
                f"step {step + 1}: {error.why}, after {self.bad_steps - 1} bad steps; training.bad_step_budget = "
                f"{training.bad_step_budget} is used up: lower optimizer.lr, look at the data, or raise it"
            )
        event = f"step {step + 1}: {error.why}; batch {self.batches} is given up"
        if training.on_bad_step == "skip":
            self.console.say(f"{event} (bad step {self.bad_steps} of {training.bad_step_budget} allowed)")
            return step
        self.checkpoints.saver.finish()
        restored = self.checkpoints.restore(max(0, step - training.rollback_steps)).step
        self.console.say(f"{event}, and the run goes back to step {restored}, with batch {self.batches + 1}")
        self.first = restored
        if self.metrics is not None:
            self.metrics.truncate_after(restored)
        if self.tracker is not None:
            self.tracker.rewind(f"{event}; back to step {restored}")
        return restored

    def _periodic(self) -> list[Periodic]:
        """What happens after steps, in this order."""
        training, saving = self.recipe.training, self.recipe.checkpoint
        validation = training.validation_interval if self.evaluator else 0
        check = training.rank_check_interval if self.parallel.world_size > 1 else 0
        return [
            Periodic("validation", validation, self._validate, after_last=validation > 0),
            Periodic(
                "telemetry", training.telemetry_interval, self._measure, after_last=training.telemetry_interval > 0
            ),
            Periodic("comparing the ranks", check, lambda _: self.stragglers.check(), after_last=False),
            Periodic("saving", saving.interval, self._save, after_last=saving.save_last),
        ]

    def _after_step(self, done: int, result: StepResult, seconds: float) -> None:
        training, last = self.recipe.training, done == self.recipe.training.steps
        tokens_per_second = training.global_batch_size * self.recipe.model.seq_length / seconds
        logged = done % training.log_interval == 0 or last
        dense, _ = model_flops_per_token(self.recipe, done - 1)
        mfu = dense * tokens_per_second / self.peak if self.peak else None
        self.console.step(done, result, tokens_per_second, logged, mfu)
        if logged:
            self._log_step(done, result, tokens_per_second)
        for periodic in self.periodic:
            if periodic.is_due(done, last):
                self.heart.enter(periodic.phase, done)
                periodic.action(done)

    def _log_step(self, done: int, result: StepResult, tokens_per_second: float) -> None:
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
        if self.peak:
            values["mfu"] = dense * tokens_per_second / self.peak
        if self.recipe.training.on_bad_step != "stop":
            values["skipped_batches"] = self.batches - done
        self._record(done, values | step_metrics(self.comm_totals, self.parallel))

    def _validate(self, done: int) -> None:
        assert self.evaluator is not None, "an interval of validation has data to validate on"
        values = self.evaluator.run(self.trainer)
        self._record(done, values)
        self.console.say(f"step {done}: validation {self.evaluator.summary()}")

    def _measure(self, done: int) -> None:
        values = self.telemetry.measure(done)
        self._record(done, values)
        flips = f", flip rate {values['flip_rate']:.2%}" if "flip_rate" in values else ""
        total = f" ({values['flip_rate_cumulative']:.2%} in all)" if flips else ""
        self.console.say(f"step {done}: zeros {values['zero_fraction']:.1%}{flips}{total}")

    def _record(self, done: int, values: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.append(done, values)

    def _save(self, done: int) -> None:
        run_id = self.tracker.run_id if self.tracker is not None else None
        if self.metrics is not None:
            self.metrics.flush_to_disk()
        self.checkpoints.save(done, self.batches, run_id, self.bad_steps)

    @contextmanager
    def _tracked(self) -> Iterator["Ending"]:
        """MLflow on rank 0, which learns how the run ended: FINISHED unless the body says or raises otherwise."""
        self.tracker = tracker = start_tracker(self.recipe, self.parallel, self.folder, self.run_id)
        interval = self.recipe.tracking.system_metrics_interval if tracker is not None else 0.0
        ending = Ending()
        status: EndStatus = "FAILED"
        try:
            with sampled(self.folder.path, interval):
                yield ending
            status = ending.status
        finally:
            if tracker is not None:
                tracker.close(status)
