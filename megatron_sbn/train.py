"""Entry of every rank: `torchrun --nproc-per-node N -m megatron_sbn.train RECIPE [section.key=value ...]`.

The recipe is checked, against the number of ranks too, before torch is imported: a bad one costs nothing and is
one line. The loop itself is training/loop.py. What takes time is imported after the rank listens for signals.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sbn import engines
from megatron_sbn.errors import InputError, RecipeError, SbnError, StopRequestedError
from megatron_sbn.launch import environment
from megatron_sbn.launch.output import outlive_reader
from megatron_sbn.launch.stop_signals import StopSignals
from megatron_sbn.redaction import show_anything

if TYPE_CHECKING:
    from megatron_sbn.config import Recipe

SECONDS_TO_SPEAK = 1.0
USAGE = "usage: torchrun --nproc-per-node N -m megatron_sbn.train RECIPE [section.key=value ...]"


def main(arguments: list[str]) -> int:
    """Trains on this rank; returns the exit status of errors.py."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else RecipeError.status
    show_anything()
    outlive_reader()
    environment.end_with_launcher()
    with StopSignals() as signals:
        try:
            recipe = _checked(arguments)
            signals.allow(recipe.checkpoint.signal_deadline)
            return _recorded(recipe, signals)
        except SbnError as error:
            _report(error)
            return error.status


def _checked(arguments: list[str]) -> "Recipe":
    from megatron_sbn.config import load_recipe
    from megatron_sbn.config.validation import validate_world_size
    from megatron_sbn.data.data_check import check_data
    from megatron_sbn.training.preflight import check_start

    recipe = load_recipe(arguments[0], arguments[1:])
    validate_world_size(recipe, environment.world_size())
    engines.check_installed()
    if environment.rank() == 0:
        check_start(recipe)
        check_data(recipe)
    return recipe


def _recorded(recipe: "Recipe", signals: StopSignals) -> int:
    from megatron_sbn.training.preflight import record_stop

    try:
        return _train(recipe, signals)
    except StopRequestedError as error:
        if environment.rank() == 0:
            record_stop(recipe, error.reason)
        raise


def _train(recipe: "Recipe", signals: StopSignals) -> int:
    from megatron_sbn.tracking.mlflow_settings import configure_mlflow

    engines.quiet_engines()
    environment.ensure_caches()
    if recipe.device == "cpu":
        environment.hide_gpus()
    configure_mlflow()
    # Importing the engines takes seconds: after the checks.
    try:
        from megatron_sbn.training.loop import run
    except ImportError as error:
        raise InputError(f"{sys.executable} cannot import the engines ({error}); install them again") from error

    return run(recipe, signals)


def _report(error: SbnError) -> None:
    """One line; what is the same on every rank is said by rank 0 alone."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:  # what torchrun's summary shows, in place of "To enable traceback see ..."
        message = {"message": f"sbn: {error}", "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")
    if error.on_every_rank and environment.rank() != 0:
        time.sleep(SECONDS_TO_SPEAK)  # a launcher ends all ranks when the first has failed
        return
    where = "" if error.on_every_rank or environment.world_size() == 1 else f"rank {environment.rank()}: "
    print(f"sbn: {where}{error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of the communication backends may outlive a failed collective: leave without waiting for them.
    os._exit(status)
