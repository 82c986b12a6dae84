"""`sbn sweep list | write | run | submit FILE`: many recipes from one file."""

import argparse
import sys
from pathlib import Path

from megatron_sbn.atomic_files import make_folder, write_atomically
from megatron_sbn.cli.options import Commands, add_command, add_job_options, positive
from megatron_sbn.errors import RecipeError
from megatron_sbn.runs.folder import LOGS, STOP


def list_recipes(options: argparse.Namespace) -> int:
    """Number, name, ranks and changes of every recipe."""
    from megatron_sbn.config.sweep import load_sweep

    study = load_sweep(options.sweep)
    for index, variant in enumerate(study.variants):
        changes = " ".join(o for o in variant.overrides[1:] if any(o not in v.overrides for v in study.variants))
        print(f"{index:>4}  {variant.name}  {variant.ranks} rank{'s' if variant.ranks > 1 else ''}  {changes}")
    return 0


def write(options: argparse.Namespace) -> int:
    """Every resolved recipe as a file."""
    from megatron_sbn.config import check_no_password
    from megatron_sbn.config.sweep import load_sweep

    study = load_sweep(options.sweep)
    for variant in study.variants:
        check_no_password(variant.recipe, options.output)
    make_folder(Path(options.output))
    for variant in study.variants:
        write_atomically(Path(options.output) / f"{variant.name}.yaml", variant.recipe.to_yaml().encode())
    print(f"wrote {len(study.variants)} recipes to {options.output}")
    return 0


def run(options: argparse.Namespace) -> int:
    """Trains one recipe on this machine, or all of them."""
    from megatron_sbn.config.sweep import load_sweep
    from megatron_sbn.config.yaml_file import override_of
    from megatron_sbn.data.data_check import warn_of_data
    from megatron_sbn.launch import environment, launch

    environment.end_with_launcher()
    if options.all:
        return _run_all(options)
    study = load_sweep(options.sweep)
    folder, count = Path(options.folder) / study.name, len(study.variants)
    if options.at_most is not None:
        raise RecipeError(f"--at-most {options.at_most} goes with --all; give it, or leave --at-most out")
    if options.number not in range(count):
        raise RecipeError(f"--number {options.number}: {options.sweep} has recipes 0 to {count - 1}")
    variant = study.variants[options.number]
    warn_of_data(variant.recipe)
    run_dir = override_of("run_dir", str(folder / variant.name))
    return launch([str(study.base), *variant.overrides, run_dir], variant.ranks)


def _run_all(options: argparse.Namespace) -> int:
    """Every recipe that is not finished; the status is 0, else the first that is not."""
    from megatron_sbn.config.sweep import load_sweep
    from megatron_sbn.launch.many import Command, run_all
    from megatron_sbn.runs.status import read_status

    study = load_sweep(options.sweep)
    commands = {}
    for number, variant in enumerate(study.variants):
        status = read_status(Path(options.folder) / study.name / variant.name)
        if status is not None and status.state == "FINISHED" and status.step >= variant.recipe.training.steps:
            print(f"finished already: {variant.name}")
            continue
        words = ["sweep", "run", options.sweep, "--number", str(number), "--folder", options.folder]
        commands[variant.name] = Command([sys.executable, "-m", "megatron_sbn.cli", *words], variant.ranks)
    study_folder = Path(options.folder) / study.name
    outcomes = run_all(commands, options.at_most or 1, lambda: (study_folder / STOP).exists())
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.status}
    print(f"{len(study.variants)} recipes: {len(study.variants) - len(failed)} finished, {len(failed)} not")
    for name, outcome in failed.items():
        folder = Path(options.folder) / study.name / name
        status = read_status(folder) if outcome.begun else None
        reason = outcome.reason or (status.reason if status is not None else "")
        print(f"  {name}: {f'status {outcome.status}: {reason or folder / LOGS}' if outcome.begun else 'not begun'}")
    return next((outcome.status for outcome in failed.values()), 0)


def submit(options: argparse.Namespace) -> int:
    """Hands all recipes to Slurm."""
    from megatron_sbn.cluster import submission

    if options.one_job and options.at_most:
        raise RecipeError("--at-most is of arrays, and --one-job runs one recipe at a time; leave one of them out")
    request = submission.Request(options.nproc_per_node, options.time, tuple(options.sbatch))
    planned = submission.plan_sweep(options.sweep, options.folder, request, options.at_most, options.one_job)
    submission.submit(planned, dry_run=options.dry_run)
    return 0


def add_sweep(commands: Commands) -> None:
    """Its verbs and their options."""
    text = "expand a sweep file to recipes: list, write, train or submit them"
    command = commands.add_parser("sweep", help=text, description=text)
    verbs = command.add_subparsers(required=True, metavar="VERB")
    _add_list_and_write(verbs)
    verb = add_command(verbs, "run", run, "train (or resume) one recipe of a sweep on this machine, or all of them")
    _add_file(verb)
    which = verb.add_mutually_exclusive_group(required=True)
    which.add_argument("--number", type=int, metavar="K", help="the recipe that `sbn sweep list` numbers K")
    which.add_argument("--all", action="store_true", help="every recipe that is not finished yet")
    verb.add_argument("--at-most", type=positive, metavar="J", help="--all: so many at a time (default: 1)")
    _add_folder(verb)
    verb.epilog = (
        "example: sbn sweep run recipes/sweeps/n-of-8-tiny.yaml --number 3\n"
        "         sbn sweep run recipes/sweeps/n-of-8-tiny.yaml --all --at-most 2"
    )
    verb = add_command(verbs, "submit", submit, "submit one Slurm array per world size of a sweep")
    _add_file(verb)
    _add_folder(verb)
    ranks = "most ranks a node (default: its GPUs, else 8)"
    verb.add_argument("--nproc-per-node", type=positive, metavar="G", help=ranks)
    verb.add_argument("--at-most", type=positive, metavar="P", help="so many of an array at a time")
    verb.add_argument("--one-job", action="store_true", help="one job, all sizes in turn on the same nodes (scaling)")
    add_job_options(verb)
    verb.epilog = (
        "example: sbn sweep submit recipes/sweeps/n-of-8-tiny.yaml --at-most 4 --dry-run\n"
        "         sbn sweep submit recipes/sweeps/weak-scaling-qwen2.5-0.5b.yaml --one-job --time 08:00:00"
    )


def _add_list_and_write(verbs: Commands) -> None:
    verb = add_command(verbs, "list", list_recipes, "list a sweep's recipes: number, name, ranks, changes")
    _add_file(verb)
    verb.epilog = "example: sbn sweep list recipes/sweeps/n-of-8-tiny.yaml"
    verb = add_command(verbs, "write", write, "write every resolved recipe of a sweep to FOLDER/NAME.yaml")
    _add_file(verb)
    verb.add_argument("--output", required=True, metavar="FOLDER", help="where the recipes go")
    verb.epilog = "example: sbn sweep write recipes/sweeps/n-of-8-tiny.yaml --output recipes/mine"


def _add_file(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("sweep", metavar="FILE", help="such as recipes/sweeps/n-of-8-tiny.yaml")


def _add_folder(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--folder", default="runs", help="where runs go: FOLDER/STUDY/NAME (default: runs)")
