"""The checkpoints of a run: what the loop saves, and what a start continues from.

What is saved is in `megatron_sbn/checkpoint`; here it is put together from a recipe and a trainer, and a checkpoint is
refused where the next batch would not be the one that follows.
"""

from collections.abc import Callable

import torch.distributed as dist

from megatron_sbn import __version__
from megatron_sbn.checkpoint.collective_errors import capture_error, first_error_on_any_rank
from megatron_sbn.checkpoint.directory import resolve
from megatron_sbn.checkpoint.loading import Opened, open_newest, open_one
from megatron_sbn.checkpoint.manifest import DataPosition, Layout, State, TelemetryState
from megatron_sbn.checkpoint.run_state import ResumableState, parameter_names
from megatron_sbn.checkpoint.saver import Saver
from megatron_sbn.checkpoint.shards import Reader
from megatron_sbn.config import Recipe
from megatron_sbn.errors import CheckpointError
from megatron_sbn.parallel.state import ParallelState
from megatron_sbn.runs.folder import RunFolder
from megatron_sbn.telemetry.mask_statistics import Telemetry
from megatron_sbn.training.step import Trainer


class CheckpointManager:
    """Saves and restores one run, on all ranks together.

    Args:
        say: takes a line for people.
    """

    def __init__(
        self,
        recipe: Recipe,
        parallel: ParallelState,
        folder: RunFolder,
        trainer: Trainer,
        telemetry: Telemetry,
        say: Callable[[str], None],
    ) -> None:
        self.recipe = recipe
        self.parallel = parallel
        self.folder = folder
        self.telemetry = telemetry
        self.trainer = trainer
        stages = trainer.stages
        self.contents = ResumableState(stages.parameters, trainer.zero, stages.state, telemetry, parallel)
        self.saver = Saver(folder.checkpoints, self.contents, recipe.checkpoint, say)
        self._say = say

    def save(self, step: int, batches: int, run_id: str | None, bad_steps: int = 0) -> None:
        """Saves the run as it is after `step` updates and `batches` batches. Raises CheckpointError (saver.py)."""
        counters = self.telemetry.counters()
        training, parallel = self.recipe.training, self.recipe.parallel
        state = State(
            step=step,
            layout=Layout(
                tensor=parallel.tensor,
                pipeline=parallel.pipeline,
                data=self.parallel.data.size,
                virtual_pipeline=parallel.virtual_pipeline or 1,
                expert=parallel.expert,
                zero_stage=parallel.zero_stage,
            ),
            data=DataPosition(
                batches=batches,
                seed=training.seed,
                global_batch_size=training.global_batch_size,
                seq_length=self.recipe.model.seq_length,
            ),
            optimizer_steps=self.trainer.zero.updates,
            masks=self.trainer.stages.state.mask_sparsity,
            telemetry=None
            if counters is None
            else TelemetryState(step=counters.step, flips=counters.flips, sparsity=counters.sparsity),
            run_id=run_id,
            bad_steps=bad_steps,
            losses=tuple(self.trainer.judge.losses),
            norms=tuple(self.trainer.judge.norms),
            version=__version__,
        )
        self.saver.save(state)

    def restore(self, at_most: int | None = None) -> State:
        """Takes everything from the newest valid checkpoint, or that of at most so many steps, and prepares the layers.

        With `at_most` a run goes back: what it goes on from is in force then, so that a start before the next save
        does not continue what was given up.

        Raises CheckpointError on every rank where none is valid, or where it is of another model or other data.
        """
        opened = open_newest(self.folder.checkpoints, self.parallel, at_most)
        for problem in opened.passed_over:
            self._say(f"a checkpoint is not valid: {problem}; the one before it is used")
        self._take(opened, weights_only=False)
        self.saver.published = opened.state.step
        if at_most is not None:
            self.saver.go_back(opened.state.step)
        return opened.state

    def branch(self, source: str, weights_only: bool) -> State:
        """Takes everything, or the weights alone, from another run's checkpoint, RUN[@STEP], and prepares the layers.

        Raises CheckpointError on every rank as `restore` does; other data is no matter with the weights alone.
        """
        with capture_error() as resolving:
            path = resolve(source)
        problem = first_error_on_any_rank(resolving.problem, self.parallel)
        if problem:
            raise _on_every_rank(problem)
        opened = open_one(path, self.parallel)
        self._take(opened, weights_only)
        return opened.state

    def _take(self, opened: Opened, weights_only: bool) -> None:
        known = self._parameter_names()
        with capture_error() as checking:
            self._check(opened, known, weights_only)
        problem = first_error_on_any_rank(checking.problem, self.parallel)
        if not problem:
            with capture_error() as reading, Reader(opened.path, opened.manifest) as reader:
                state = opened.state
                if weights_only:
                    self.contents.restore_weights(reader)
                else:
                    # Masks of another N:M, from the run that this one branched off, are of no use.
                    kept = state.masks == self.recipe.linear.at(state.step).sparsity
                    masks = state.masks if kept else None
                    self.contents.restore(reader, state.optimizer_steps, masks, state.telemetry)
            problem = first_error_on_any_rank(reading.problem, self.parallel)
        if problem:
            raise _on_every_rank(problem)
        if not weights_only:
            self.trainer.judge.recall(opened.state.losses, opened.state.norms)
        self.trainer.stages.state.prepare(0 if weights_only else opened.state.step)

    def _parameter_names(self) -> set[str]:
        """Global names of the parameters of all ranks."""
        own = [logical.name for logical in self.contents.parameters]
        gathered: list[list[str]] = [[] for _ in range(self.parallel.world_size)]
        dist.all_gather_object(gathered, own)
        return {name for names in gathered for name in names}

    def _check(self, opened: Opened, known: set[str], weights_only: bool) -> None:
        """Raises CheckpointError for a checkpoint of another model, or other data, than the recipe's."""
        data, training = opened.state.data, self.recipe.training
        for key, saved, wanted in (
            ("training.seed", data.seed, training.seed),
            ("training.global_batch_size", data.global_batch_size, training.global_batch_size),
            ("model.seq_length", data.seq_length, self.recipe.model.seq_length),
        ):
            if saved != wanted and not weights_only:
                raise CheckpointError(
                    f"{opened.path}: {key} was {saved} and is {wanted}, which would change what is read next; "
                    f"set it to {saved}, or begin a new run with start_with=weights"
                )
        for name in parameter_names(list(opened.manifest.tensors)):
            if name not in known:
                raise CheckpointError(f"{opened.path}: holds {name}, which this model lacks; use its own recipe")


def _on_every_rank(problem: str) -> CheckpointError:
    error = CheckpointError(problem)
    error.on_every_rank = True
    return error
