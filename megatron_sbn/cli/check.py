"""`sbn plan`, `sbn doctor` and `sbn checkpoint`: what can be known before a job, and of what it left."""

import argparse
from pathlib import Path

from megatron_sbn.cli.options import Commands, add_command, add_overrides, positive


def checkpoint(options: argparse.Namespace) -> int:
    """What checkpoints hold, and whether they are valid."""
    from megatron_sbn.checkpoint import command

    path = Path(options.path)
    return command.verify(path) if options.action == "verify" else command.show(path, options.tensors)


def doctor(options: argparse.Namespace) -> int:
    """Checks a recipe, and what its layout computes."""
    from megatron_sbn.doctor import command

    json_file = Path(options.json) if options.json else None
    compared = {"ranks": options.ranks, "layouts": options.layouts, "engines": options.engines, "steps": options.steps}
    return command.run(options.recipe, options.overrides, **compared, json_file=json_file)


def plan(options: argparse.Namespace) -> int:
    """What a recipe will take on some nodes."""
    from megatron_sbn.config import load_recipe
    from megatron_sbn.plan import command

    machines = command.machines_of(options.device, options.nodes, options.gpus_per_node, options.assume)
    json_file = Path(options.json) if options.json else None
    return command.run(load_recipe(options.recipe, options.overrides), machines, json_file)


def add_checkpoint(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "checkpoint", checkpoint, "show what a checkpoint holds, or verify its files")
    command.add_argument("action", choices=("show", "verify"), help="show reads the manifest, verify every file")
    command.add_argument("path", metavar="PATH", help="a checkpoint, or a run's folder for all of its checkpoints")
    command.add_argument("--tensors", action="store_true", help="show: name, type and shape of every tensor")
    command.epilog = (
        "example: sbn checkpoint verify runs/first\n"
        "exit status: 0, or 4 where a checkpoint is not valid or there is none"
    )


def add_doctor(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "doctor", doctor, "check a recipe and its layout before a job is paid for")
    command.add_argument("recipe", metavar="RECIPE", help="path of a recipe")
    add_overrides(command)
    trial = "run one step of a tiny model on N local ranks (default: one replica) and compare it with a single rank"
    command.add_argument("--ranks", type=positive, nargs="?", const=0, metavar="N", help=trial)
    command.add_argument("--layouts", action="store_true", help="do so for every layout of up to four ranks: a table")
    others = "do so in environments with other releases of torch, megatron-core or deepspeed: are the bits equal?"
    command.add_argument("--engines", nargs="+", default=[], metavar="PYTHON", help=others)
    command.add_argument("--steps", type=positive, metavar="N", help="steps of --layouts (50) or --engines (4)")
    command.add_argument("--json", metavar="FILE", help="write the comparison for programs")
    command.epilog = (
        "example: sbn doctor recipes/quickstart.yaml parallel.pipeline=2 --ranks\n"
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
    command.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="default: 8")
    command.add_argument("--assume", action="append", default=[], metavar="NAME=SHARE", help="change an efficiency")
    command.add_argument("--json", metavar="FILE", help="write the plan for scripts: bytes, seconds, counts")
    command.epilog = (
        "example: sbn plan recipes/qwen2.5-3b/ternary-6of8.yaml --nodes 4 --device h200\n"
        "exit status: 0 a layout fits, 2 none does, or a bad recipe"
    )
