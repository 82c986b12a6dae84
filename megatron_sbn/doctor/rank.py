"""One rank of a trial: `python -m megatron_sbn.doctor.rank STEPS FOLDER RECIPE...` trains tiny recipes one by one.

What it saw of each goes to FOLDER/RECIPE-NAME/rank-R.safetensors (pieces of logical tensors, step 1) and rank-R.json
(losses and gradient norms of every step, bytes that it sent in the first).
"""

import json
import os
import sys
from pathlib import Path

from megatron_sbn import environment
from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.doctor.tiny import batch_of
from megatron_sbn.errors import SbnError
from megatron_sbn.stop_signals import unblock


def main(arguments: list[str]) -> int:
    """Trains every recipe on this rank; returns the exit status of errors.py."""
    steps, folder, *recipes = arguments
    environment.end_with_launcher()
    unblock()
    environment.silence_engines()
    try:
        for path in recipes:
            _trial(load_recipe(path), int(steps), Path(folder) / Path(path).stem)
    except SbnError as error:
        print(f"sbn: rank {environment.rank()}: {error}", file=sys.stderr, flush=True)
        return error.status
    return 0


def _trial(recipe: Recipe, steps: int, folder: Path) -> None:
    from megatron_sbn.feasibility import check_world
    from megatron_sbn.model import build_stages
    from megatron_sbn.parallel import state as parallel_state
    from megatron_sbn.parallel.cpu import without_cuda
    from megatron_sbn.parallel.pieces import Pieces, write_pieces
    from megatron_sbn.parallel.traffic import Traffic, group_names
    from megatron_sbn.training.step import Trainer
    from megatron_sbn.training.witness import mask_pieces, prepared_pieces, recorded_hidden_states, recorded_tokens

    check_world(recipe, environment.world_size())
    with without_cuda():
        parallel = parallel_state.initialize(recipe)
        stages = build_stages(recipe, parallel)
        trainer = Trainer(recipe, parallel, stages)
        stages.state.prepare(0)
        pieces: Pieces = prepared_pieces(stages) | mask_pieces(stages)
        traffic = Traffic(group_names(parallel))
        with recorded_hidden_states(trainer) as hidden, recorded_tokens(trainer) as tokens, traffic:
            results = [trainer.step(0, batch_of(recipe, 0)[trainer.rows()])]
        results += [trainer.step(step, batch_of(recipe, step)[trainer.rows()]) for step in range(1, steps)]
        folder.mkdir(parents=True, exist_ok=True)
        write_pieces(folder / f"rank-{parallel.rank}.safetensors", pieces | hidden | tokens)
        told = {
            "losses": [result.loss for result in results],
            "grad_norms": [result.grad_norm for result in results],
            "bytes": {f"{group}.{kind}": sent for (group, kind), (_, sent) in traffic.totals().items()},
        }
        (folder / f"rank-{parallel.rank}.json").write_text(json.dumps(told), encoding="utf-8")
        parallel_state.finalize()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of the communication backends may outlive a failed collective: leave without waiting for them.
    os._exit(status)
