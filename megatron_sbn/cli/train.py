"""`sbn train` and `sbn quickstart`: ranks of this machine."""

import argparse

from megatron_sbn.cli.options import Commands, add_command, add_overrides, positive


def train(options: argparse.Namespace) -> int:
    """Checks the recipe, then starts its ranks on this machine."""
    from megatron_sbn.config import load_recipe
    from megatron_sbn.config.validation import min_world_size, validate_world_size
    from megatron_sbn.data.data_check import warn_of_data
    from megatron_sbn.engines import check_installed
    from megatron_sbn.launch import launch
    from megatron_sbn.training.preflight import check_start, finished_already, record_death

    recipe = load_recipe(options.recipe, options.overrides)
    ranks = options.nproc_per_node or min_world_size(recipe)
    validate_world_size(recipe, ranks)
    check_installed()
    check_start(recipe)
    finished = finished_already(recipe)
    if finished is not None:
        print(finished)
        return 0
    warn_of_data(recipe)
    print(f"starting {ranks} rank{'s' if ranks > 1 else ''} (importing the engines takes about 10 s)", flush=True)
    status = launch([options.recipe, *options.overrides], ranks)
    record_death(recipe, status)
    return status


def quickstart(options: argparse.Namespace) -> int:
    """The main job of the README."""
    from megatron_sbn.cli import quickstart as job
    from megatron_sbn.engines import check_installed

    check_installed()

    return job.run(options.overrides, prepare_only=options.prepare_only)


def add_train(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "train", train, "train a recipe on this machine (several nodes: torchrun or Slurm)")
    command.add_argument("recipe", metavar="RECIPE", help="path of a recipe, such as recipes/quickstart.yaml")
    add_overrides(command)
    help_ranks = "ranks to start (default: one replica of the model)"
    command.add_argument("--nproc-per-node", type=positive, metavar="N", help=help_ranks)
    command.epilog = "example: sbn train recipes/quickstart.yaml training.steps=20 run_dir=runs/first"


def add_quickstart(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "quickstart", quickstart, "train ternary and dense on the Python library's text")
    command.add_argument("--prepare-only", action="store_true", help="write the shards and stop")
    command.epilog = "example: sbn quickstart training.steps=300"
    add_overrides(command)
