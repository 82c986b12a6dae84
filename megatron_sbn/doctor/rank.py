"""One rank of a trial: `python -m megatron_sbn.doctor.rank --steps N --output FOLDER RECIPE...` trains tiny recipes.

What it saw of each goes to FOLDER/RECIPE-NAME/rank-R.safetensors (shards of logical tensors, step 1) and rank-R.json
(losses and gradient norms of every step, its communication volume in the first).

With `--save RUNS` a checkpoint of half of the steps is left in RUNS/RECIPE-NAME. With `--resume RUNS` the second half
is trained again from there; its losses and norms go to FOLDER/RECIPE-NAME/resumed-R.json.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sbn import engines
from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.doctor.tiny_recipe import batch_of
from megatron_sbn.errors import SbnError
from megatron_sbn.launch import environment
from megatron_sbn.launch.stop_signals import unblock

if TYPE_CHECKING:
    from megatron_sbn.training.checkpoint_manager import CheckpointManager
    from megatron_sbn.training.step import StepResult, Trainer


def main(arguments: list[str]) -> int:
    """Trains every recipe on this rank; returns the exit status of errors.py."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("recipes", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    environment.end_with_launcher()
    unblock()
    engines.quiet_engines()
    try:
        engines.check_installed()
        for path in options.recipes:
            recipe, output = load_recipe(path), options.output / path.stem
            if recipe.device == "cpu":
                environment.hide_gpus()
            output.mkdir(parents=True, exist_ok=True)
            _trial(recipe, options.steps, output, options.save and options.save / path.stem)
            if options.resume is not None:
                _resumed(recipe, options.steps, output, options.resume / path.stem)
    except SbnError as error:
        print(f"sbn: rank {environment.rank()}: {error}", file=sys.stderr, flush=True)
        return error.status
    return 0


@contextmanager
def _trainer(recipe: Recipe) -> "Iterator[Trainer]":
    """A trainer of the recipe on this rank; its process groups are left afterwards."""
    from megatron_sbn.config.validation import validate_world_size
    from megatron_sbn.model import build_model_chunks
    from megatron_sbn.parallel import state as parallel_state
    from megatron_sbn.parallel.cuda_shim import without_cuda
    from megatron_sbn.training.step import Trainer

    validate_world_size(recipe, environment.world_size())
    with without_cuda():
        parallel = parallel_state.initialize(recipe)
        yield Trainer(recipe, parallel, build_model_chunks(recipe, parallel))
        parallel_state.finalize()


def _trial(recipe: Recipe, steps: int, output: Path, save: Path | None) -> None:
    from megatron_sbn.doctor.logical_tensors import TensorShards, write_shards
    from megatron_sbn.doctor.recorder import mask_shards, prepared_shards, recorded_hidden_states, recorded_tokens
    from megatron_sbn.parallel.comm_counter import CommCounter, group_names

    with _trainer(recipe) as trainer:
        stages, rank = trainer.stages, trainer.parallel.rank
        stages.state.prepare(0)
        shards: TensorShards = prepared_shards(stages) | mask_shards(stages)
        traffic = CommCounter(group_names(trainer.parallel))
        with recorded_hidden_states(trainer) as hidden, recorded_tokens(trainer) as tokens, traffic:
            results = _train(trainer, 0, 1)
        results += _train(trainer, 1, steps // 2)
        if save is not None:
            checkpoints = _checkpoints(trainer, save)
            checkpoints.save(steps // 2, steps // 2, None)
            checkpoints.saver.finish()
        results += _train(trainer, max(1, steps // 2), steps)
        write_shards(output / f"rank-{rank}.safetensors", shards | hidden | tokens)
        moved = {f"{group}.{kind}": volume for (group, kind), (_, volume) in traffic.totals().items()}
        (output / f"rank-{rank}.json").write_text(json.dumps(_numbers(results) | {"bytes": moved}), encoding="utf-8")


def _resumed(recipe: Recipe, steps: int, output: Path, saved: Path) -> None:
    """The steps that follow a checkpoint."""
    with _trainer(recipe) as trainer:
        first = _checkpoints(trainer, saved).restore().step
        results = _train(trainer, first, steps)
        (output / f"resumed-{trainer.parallel.rank}.json").write_text(json.dumps(_numbers(results)), encoding="utf-8")


def _checkpoints(trainer: "Trainer", folder: Path) -> "CheckpointManager":
    from megatron_sbn.runs.folder import RunFolder
    from megatron_sbn.telemetry.mask_statistics import Telemetry
    from megatron_sbn.training.checkpoint_manager import CheckpointManager

    telemetry = Telemetry(trainer.stages.state, trainer.parallel)
    run = RunFolder(folder, continues=True)
    return CheckpointManager(trainer.recipe, trainer.parallel, run, trainer, telemetry, lambda line: None)


def _train(trainer: "Trainer", first: int, last: int) -> "list[StepResult]":
    """Steps `first` to `last` - 1."""
    rows = trainer.rows()
    return [trainer.step(step, batch_of(trainer.recipe, step)[rows]) for step in range(first, last)]


def _numbers(results: "list[StepResult]") -> dict[str, list[float]]:
    return {"losses": [result.loss for result in results], "grad_norms": [result.grad_norm for result in results]}


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of the communication backends may outlive a failed collective: leave without waiting for them.
    os._exit(status)
