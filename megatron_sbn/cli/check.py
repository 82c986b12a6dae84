"""`sbn plan`, `sbn doctor` and `sbn checkpoint`: what can be known before a job, and of what it left."""

import argparse
from pathlib import Path

from megatron_sbn.cli.options import Commands, add_command, add_overrides, positive
from megatron_sbn.errors import InputError, RecipeError


def checkpoint(options: argparse.Namespace) -> int:
    """What checkpoints hold, and whether they are valid."""
    from megatron_sbn.checkpoint import command

    if options.action == "average":
        from megatron_sbn.engines import quiet_engines

        if options.output is None:
            raise InputError("sbn checkpoint average: give --output FOLDER, where the new checkpoint goes")
        quiet_engines()
        from megatron_sbn.checkpoint.average import average

        print(f"saved {average(options.path, Path(options.output))}; start with it: start_from, start_with=weights")
        return 0
    if len(options.path) > 1:
        raise InputError(f"sbn checkpoint {options.action}: takes one PATH, not {len(options.path)}")
    path = Path(options.path[0])
    return command.verify(path) if options.action == "verify" else command.show(path, options.tensors)


def doctor(options: argparse.Namespace) -> int:
    """Checks a recipe, and what its layout computes; or says what this machine has."""
    if options.machine:
        from megatron_sbn.cluster.machine import describe
        from megatron_sbn.runs.folder import RUNS

        print("\n".join(describe(RUNS.absolute())))
        return 0
    if options.recipe is None:
        raise RecipeError("sbn doctor: give a RECIPE to check, or --machine to see what this machine has")
    from megatron_sbn.doctor import command

    json_file = Path(options.json) if options.json else None
    compared = {"ranks": options.ranks, "layouts": options.layouts, "engines": options.engines, "steps": options.steps}
    return command.run(options.recipe, options.overrides, **compared, json_file=json_file)


def plan(options: argparse.Namespace) -> int:
    """What a recipe will take on some nodes."""
    from megatron_sbn.config import load_recipe
    from megatron_sbn.data.passes import data_lines
    from megatron_sbn.plan import command

    machines = command.machines_of(options.device, options.nodes, options.gpus_per_node, options.assume)
    json_file = Path(options.json) if options.json else None
    recipe = load_recipe(options.recipe, options.overrides)
    status = command.run(recipe, machines, json_file)
    print("\n".join(["", "Data", *(f"  {line}" for line in data_lines(recipe))]))
    return status


def add_checkpoint(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "checkpoint", checkpoint, "show, verify or average checkpoints")
    actions = "show reads the manifest, verify every file; average writes the mean of several checkpoints' weights"
    command.add_argument("action", choices=("show", "verify", "average"), help=actions)
    paths = "a checkpoint, or a run's folder for all of its checkpoints; average: RUN[@STEP] each"
    command.add_argument("path", metavar="PATH", nargs="+", help=paths)
    command.add_argument("--output", metavar="FOLDER", help="average: the new checkpoint")
    command.add_argument("--tensors", action="store_true", help="show: name, type and shape of every tensor")
    command.epilog = (
        "example: sbn checkpoint verify runs/first\n"
        "         sbn checkpoint average runs/first@40 runs/first@50 --output averaged\n"
        "exit status: 0, or 4 where a checkpoint is not valid or there is none"
    )


def add_doctor(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "doctor", doctor, "check a recipe and its layout before a job is paid for")
    command.add_argument("recipe", nargs="?", metavar="RECIPE", help="path of a recipe")
    add_overrides(command)
    machine = "say what this machine has and check no recipe: GPUs, driver, NCCL, network, CPUs, memory, disk"
    command.add_argument("--machine", action="store_true", help=machine)
    trial = "run one step of a tiny model on N local ranks (default: one replica) and compare it with a single rank"
    command.add_argument("--ranks", type=positive, nargs="?", const=0, metavar="N", help=trial)
    command.add_argument("--layouts", action="store_true", help="do so for every layout of up to four ranks: a table")
    others = "do so in environments with other releases of torch, megatron-core or deepspeed: are the bits equal?"
    command.add_argument("--engines", nargs="+", default=[], metavar="PYTHON", help=others)
    command.add_argument("--steps", type=positive, metavar="N", help="steps of --layouts (50) or --engines (4)")
    command.add_argument("--json", metavar="FILE", help="write the comparison for programs")
    command.epilog = (
        "example: sbn doctor --machine\n"
        "         sbn doctor recipes/quickstart.yaml parallel.pipeline=2 --ranks\n"
        "         sbn doctor recipes/quickstart.yaml --engines /opt/newer/bin/python\n"
        "exit status: 0 equal, 1 different, 2 a bad recipe"
    )


def add_plan(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "plan", plan, "plan a job: memory, communication, step time and layouts")
    command.add_argument("recipe", metavar="RECIPE", help="path of a recipe")
    add_overrides(command)
    command.add_argument("--nodes", type=positive, required=True, metavar="N", help="nodes of the job")
    command.add_argument("--device", required=True, metavar="NAME", help="a100, h100, h200 or b200")
    command.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="GPUs of a node (default: 8)")
    command.add_argument("--assume", action="append", default=[], metavar="NAME=SHARE", help="change an efficiency")
    command.add_argument("--json", metavar="FILE", help="write the plan for scripts: bytes, seconds, counts")
    command.epilog = (
        "example: sbn plan recipes/qwen2.5-3b/ternary-6of8.yaml --nodes 4 --device h200\n"
        "exit status: 0 a layout fits, 2 none does, or a bad recipe"
    )
