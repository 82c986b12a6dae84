"""The `sbn` command: one short function per subcommand. Each has --help with an example.

Imports neither torch nor the engines here: a bad recipe or a wrong option is told at once, and the worker processes of
`sbn prepare`, which import this module again, start quickly.
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from megatron_sbn import __version__
from megatron_sbn.atomic_files import make_folder, write_whole
from megatron_sbn.errors import RecipeError, SbnError
from megatron_sbn.redaction import excerpt, one_line, show_anything


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status (errors.py)."""
    show_anything()
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no positional arguments after an option: `train R --nproc-per-node 2 training.steps=20`.
    if rest and "overrides" in options and all("=" in word and not word.startswith("-") for word in rest):
        options.overrides += rest
    elif rest:
        parser.error(f"unknown: {' '.join(rest)}")
    try:
        status: int = options.run(options)
    except SbnError as error:
        print(f"sbn: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:  # the reader of a list, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("sbn: interrupted", file=sys.stderr)
        return 130
    return status


def train(options: argparse.Namespace) -> int:
    """Checks the recipe, then starts its ranks on this machine."""
    from megatron_sbn.config import load_recipe
    from megatron_sbn.config.validation import check_world, model_ranks
    from megatron_sbn.launch import launch

    recipe = load_recipe(options.recipe, options.overrides)
    ranks = options.nproc_per_node or model_ranks(recipe)
    check_world(recipe, ranks)
    return launch([options.recipe, *options.overrides], ranks)


def prepare(options: argparse.Namespace) -> int:
    """Text to token shards."""
    from megatron_sbn.data import corpus

    plan = corpus.PrepareOptions(
        inputs=tuple(options.input),
        output=Path(options.output),
        tokenizer=Path(options.tokenizer) if options.tokenizer else None,
        vocab_size=options.vocab_size,
        text_field=options.text_field,
        validation_fraction=options.validation_fraction,
        skip_bad=options.skip_bad,
        seed=options.seed,
    )
    if corpus.is_prepared(plan):
        print(f"{options.output}: prepared already from the same text with the same settings")
        return 0
    report = corpus.prepare(plan, workers=options.workers)
    for split, (documents, tokens) in report.splits.items():
        print(f"{split}: {documents:,} documents, {tokens:,} tokens")
    for kind, count in sorted(report.skipped.items()):
        print(f"skipped: {count} x {kind}")
    for example in report.examples:
        print(f"  such as {example}")
    print("wrote " + " ".join(str(path) for path in report.paths))
    return 0


def sync(options: argparse.Namespace) -> int:
    """Delivers what a run folder holds and MLflow does not."""
    from megatron_sbn.tracking.tracker import sync as deliver

    for folder in options.run_folders:
        print(f"{folder}: delivered to MLflow run {deliver(Path(folder), options.uri)}")
    return 0


def checkpoint(options: argparse.Namespace) -> int:
    """What checkpoints hold, and whether they are whole."""
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


def sweep(options: argparse.Namespace) -> int:
    """Lists a sweep's recipes, writes them, trains one here, or hands all of them to Slurm."""
    from megatron_sbn.config import check_no_password
    from megatron_sbn.config.sweep import load_sweep
    from megatron_sbn.config.yaml_file import override_of
    from megatron_sbn.launch import launch

    if options.submit:
        return _submit_sweep(options)
    if options.dry_run or options.at_most or options.time or options.one_job:
        raise RecipeError("--dry-run, --at-most, --time and --one-job go with --submit; give it, or leave them out")
    study = load_sweep(options.sweep)
    count = len(study.variants)
    if options.write is not None:
        for variant in study.variants:
            check_no_password(variant.recipe, options.write)
        make_folder(Path(options.write))
        for variant in study.variants:
            write_whole(Path(options.write) / f"{variant.name}.yaml", variant.recipe.to_yaml().encode())
        print(f"wrote {count} recipes to {options.write}")
        return 0
    if options.number is None:
        for index, variant in enumerate(study.variants):
            changes = " ".join(o for o in variant.overrides[1:] if any(o not in v.overrides for v in study.variants))
            print(f"{index:>4}  {variant.name}  {variant.ranks} rank{'s' if variant.ranks > 1 else ''}  {changes}")
        return 0
    if options.number not in range(count):
        raise RecipeError(f"--run {options.number}: {options.sweep} has recipes 0 to {count - 1}")
    variant = study.variants[options.number]
    folder = Path(options.folder) / study.name / variant.name
    return launch([str(study.base), *variant.overrides, override_of("run_dir", str(folder))], variant.ranks)


def submit(options: argparse.Namespace) -> int:
    """Hands a run to Slurm."""
    from megatron_sbn.cluster import submission

    planned = submission.plan_run(
        options.recipe, options.overrides, options.nodes, options.nproc_per_node, options.time
    )
    submission.submit(planned, dry_run=options.dry_run)
    return 0


def _submit_sweep(options: argparse.Namespace) -> int:
    from megatron_sbn.cluster import submission

    if options.one_job and options.at_most:
        raise RecipeError("--at-most is of arrays, and --one-job runs one recipe at a time; leave one of them out")
    planned = submission.plan_sweep(
        options.sweep, options.folder, options.nproc_per_node, options.time, options.at_most, options.one_job
    )
    submission.submit(planned, dry_run=options.dry_run)
    return 0


def compare(options: argparse.Namespace) -> int:
    """Prints runs side by side."""
    from megatron_sbn.analysis.compare import report
    from megatron_sbn.runs.finished_run import read_run

    print(report([read_run(Path(folder)) for folder in options.run_folders]))
    return 0


def report(options: argparse.Namespace) -> int:
    """Writes the page of a study."""
    from megatron_sbn.analysis.report import read_study, tracked_as, write_report
    from megatron_sbn.tracking.mlflow_delivery import attach_report, delivered_study

    study = Path(options.study)
    runs = delivered_study(options.uri, options.study) if options.uri else read_study(study)
    output = Path(options.output or (f"{options.study}-report" if options.uri else study / "report"))
    files = write_report(study.absolute().name, runs, output)
    print(f"wrote {output / 'index.md'}")
    if options.attach:
        uri, name = (options.uri, options.study) if options.uri else tracked_as(study)
        for run_id in attach_report(uri, name, files):
            print(f"attached to MLflow run {run_id} of study {name}, artifacts report/")
    return 0


def quickstart(options: argparse.Namespace) -> int:
    """The main job of the README."""
    from megatron_sbn import quickstart as job

    return job.run(options.overrides, prepare_only=options.prepare_only)


class _Parser(argparse.ArgumentParser):
    """What it complains about is shown as in every other message: no passwords, on one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and leaves with status 2."""
        super().error(one_line(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sbn", description="Pretraining of Sparse-BitNet language models.")
    parser.add_argument("--version", action="version", version=f"megatron_sbn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_prepare(commands)
    _add_checkpoint(commands)
    _add_doctor(commands)
    _add_plan(commands)
    _add_sweep(commands)
    _add_submit(commands)
    command = _add(commands, "sync", sync, "deliver a run folder's metrics to MLflow, each once")
    command.add_argument("run_folders", nargs="+", metavar="RUN", help="run folder")
    command.add_argument("--uri", help="MLflow server (default: the one of the run's recipe)")
    command.epilog = "example: sbn sync runs/quickstart-* --uri http://mlflow.example:5000"
    command = _add(commands, "compare", compare, "runs side by side: recipes, metrics at equal tokens and FLOPs")
    command.add_argument("run_folders", nargs="+", metavar="RUN", help="run folder")
    command.epilog = "example: sbn compare runs/quickstart-ternary-6of8-* runs/quickstart-dense-bf16-*"
    command = _add(commands, "report", report, "a page, a table and figures of a study")
    command.add_argument("study", metavar="STUDY", help="folder of run folders, or with --uri a study's name")
    command.add_argument("--uri", help="read the study's runs from this MLflow instead")
    command.add_argument("--output", metavar="FOLDER", help="where the page goes (default: STUDY/report, STUDY-report)")
    command.add_argument("--attach", action="store_true", help="make all of it artifacts of the study's run in MLflow")
    command.epilog = (
        "example: sbn report runs/n-of-8-tiny\n"
        "         sbn report n-of-8-tiny --uri http://mlflow.example:5000 --attach"
    )
    command = _add(commands, "quickstart", quickstart, "ternary against dense on this machine's own Python library")
    command.add_argument("--prepare-only", action="store_true", help="write the shards and stop")
    command.epilog = "example: sbn quickstart training.steps=300"
    _add_overrides(command)
    return parser


def _add(commands: "argparse._SubParsersAction[_Parser]", name: str, run: object, text: str) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=text, description=text, formatter_class=formatter)
    command.set_defaults(run=run)
    return command


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")


def _add_train(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = _add(commands, "train", train, "train a recipe on this machine (several nodes: torchrun or Slurm)")
    command.add_argument("recipe", metavar="RECIPE", help="path of a recipe, such as recipes/quickstart.yaml")
    _add_overrides(command)
    help_ranks = "ranks to start (default: one replica of the model)"
    command.add_argument("--nproc-per-node", type=_positive, metavar="N", help=help_ranks)
    command.epilog = "example: sbn train recipes/quickstart.yaml training.steps=20 run_dir=runs/first"


def _add_checkpoint(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = _add(commands, "checkpoint", checkpoint, "show what a checkpoint holds, or verify that it is whole")
    command.add_argument("action", choices=("show", "verify"), help="show reads the manifest, verify every file")
    command.add_argument("path", metavar="PATH", help="a checkpoint, or a run's folder for all of its checkpoints")
    command.add_argument("--tensors", action="store_true", help="show: name, type and shape of every tensor")
    command.epilog = (
        "example: sbn checkpoint verify runs/first\n"
        "exit status: 0, or 4 where a checkpoint is not whole or there is none"
    )


def _add_doctor(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = _add(commands, "doctor", doctor, "check a recipe and its layout before a job is paid for")
    command.add_argument("recipe", metavar="RECIPE", help="path of a recipe")
    _add_overrides(command)
    trial = "run one step of a tiny model on N local ranks (default: one replica) and compare it with a single rank"
    command.add_argument("--ranks", type=_positive, nargs="?", const=0, metavar="N", help=trial)
    command.add_argument("--layouts", action="store_true", help="do so for every layout of up to four ranks: a table")
    others = "do so in environments with other releases of torch, megatron-core or deepspeed: are the bits equal?"
    command.add_argument("--engines", nargs="+", default=[], metavar="PYTHON", help=others)
    command.add_argument("--steps", type=_positive, metavar="N", help="steps of --layouts (50) or --engines (4)")
    command.add_argument("--json", metavar="FILE", help="write the comparison for programs")
    command.epilog = (
        "example: sbn doctor recipes/quickstart.yaml parallel.pipeline=2 --ranks\n"
        "         sbn doctor recipes/quickstart.yaml --engines /opt/newer/bin/python\n"
        "exit status: 0 equal, 1 different, 2 a bad recipe"
    )


def _add_plan(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = _add(commands, "plan", plan, "memory, bytes, time and layouts of a recipe before nodes are asked for")
    command.add_argument("recipe", metavar="RECIPE", help="path of a recipe")
    _add_overrides(command)
    command.add_argument("--nodes", type=_positive, required=True, metavar="N", help="nodes of the job")
    command.add_argument("--device", required=True, metavar="NAME", help="a100, h100, h200 or b200")
    command.add_argument("--gpus-per-node", type=_positive, default=8, metavar="N", help="default: 8")
    command.add_argument("--assume", action="append", default=[], metavar="NAME=SHARE", help="change an efficiency")
    command.add_argument("--json", metavar="FILE", help="write the plan for scripts: bytes, seconds, counts")
    command.epilog = (
        "example: sbn plan recipes/qwen2.5-3b/ternary-6of8.yaml --nodes 4 --device h200\n"
        "exit status: 0 a layout fits, 2 none does, or a bad recipe"
    )


def _add_sweep(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = _add(commands, "sweep", sweep, "expand a sweep file to recipes: list, write, or train one of them")
    command.add_argument("sweep", metavar="FILE", help="such as recipes/sweeps/n-of-8-tiny.yaml")
    action = command.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="number, name, ranks and changes of every recipe")
    action.add_argument("--write", metavar="FOLDER", help="write every resolved recipe to FOLDER/NAME.yaml")
    action.add_argument(
        "--run", dest="number", type=int, metavar="K", help="train recipe number K on this machine, or go on with it"
    )
    action.add_argument("--submit", action="store_true", help="train all of them on Slurm: an array a number of ranks")
    command.add_argument("--folder", default="runs", help="where runs go: FOLDER/STUDY/NAME (default: runs)")
    command.add_argument(
        "--nproc-per-node", type=_positive, default=8, metavar="G", help="--submit: most ranks a node (default: 8)"
    )
    command.add_argument("--at-most", type=_positive, metavar="P", help="--submit: so many of an array at a time")
    command.add_argument(
        "--one-job", action="store_true", help="--submit: one job, all sizes in turn on the same nodes (scaling)"
    )
    _add_job_options(command)
    command.epilog = (
        "example: sbn sweep recipes/sweeps/n-of-8-tiny.yaml --run 3\n"
        "         sbn sweep recipes/sweeps/n-of-8-tiny.yaml --submit --at-most 4 --dry-run\n"
        "         sbn sweep recipes/sweeps/weak-scaling-qwen2.5-0.5b.yaml --submit --one-job --time 08:00:00"
    )


def _add_submit(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = _add(commands, "submit", submit, "train a recipe on Slurm, from a copy of the code")
    command.add_argument("recipe", metavar="RECIPE", help="path of a recipe, such as recipes/quickstart.yaml")
    _add_overrides(command)
    command.add_argument("--nodes", type=_positive, default=1, metavar="N", help="default: 1")
    command.add_argument(
        "--nproc-per-node", type=_positive, metavar="G", help="ranks of a node (default: one replica over the nodes)"
    )
    _add_job_options(command)
    command.epilog = (
        "example: sbn submit recipes/quickstart.yaml --nodes 2 --nproc-per-node 8 --time 24:00:00 --dry-run"
    )


def _add_job_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--time", type=_time_limit, metavar="HH:MM:SS", help="limit of a job (default: the site's)")
    command.add_argument("--dry-run", action="store_true", help="show what would be written and submitted, do nothing")


def _add_prepare(commands: "argparse._SubParsersAction[_Parser]") -> None:
    command = _add(commands, "prepare", prepare, "tokenise text into Megatron .bin/.idx shards")
    command.add_argument("--input", nargs="+", required=True, metavar="FILE|GLOB", help="txt, jsonl or parquet")
    command.add_argument("--output", required=True, metavar="PREFIX", help="where the shards go")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenizer", metavar="MODEL", help="a sentencepiece model")
    source.add_argument("--vocab-size", type=_positive, metavar="N", help="train a tokenizer of N pieces first")
    command.add_argument("--text-field", default="text", help="field or column that holds the text (default: text)")
    command.add_argument("--validation-fraction", type=float, default=0.0, metavar="F", help="documents held out")
    command.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="processes (default: cores)")
    command.add_argument("--skip-bad", action="store_true", help="skip and count bad documents instead of stopping")
    command.add_argument("--seed", type=int, default=0, help="of the split and the tokenizer's sample")
    command.epilog = (
        "example: sbn prepare --input 'corpus/**/*.jsonl' --output data/corpus --vocab-size 32000 "
        "--validation-fraction 0.01"
    )


def _time_limit(text: str) -> str:
    """As sbatch takes it."""
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write HH:MM:SS or DAYS-HH:MM:SS")
    return text


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{excerpt(text)} is not a whole number from 1 to 999,999,999")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
