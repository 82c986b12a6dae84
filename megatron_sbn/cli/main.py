"""The `sbn` command: its subcommands, and what becomes of their errors. Each has --help with an example.

Imports neither torch nor the engines here: a bad recipe or a wrong option is an error at once, and the worker processes
of `sbn prepare`, which import this module again, start quickly.
"""

import argparse
import os
import sys

from megatron_sbn import __version__
from megatron_sbn.cli import check, keys, prepare, results, runs, slurm, sweep, train
from megatron_sbn.cli.options import Parser
from megatron_sbn.errors import SbnError
from megatron_sbn.redaction import show_anything


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand; returns its exit status (errors.py)."""
    show_anything()
    parser = _parser()
    words, sbatch = _split(sys.argv[1:] if arguments is None else arguments)
    options, rest = parser.parse_known_args(words)
    if "sbatch" in options:
        rest, options.sbatch = options.sbatch + rest, sbatch
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


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is said to `sbn`, and what to sbatch: the words after --."""
    submits = arguments[:1] == ["submit"] or arguments[:2] == ["sweep", "submit"]
    if not submits or "--" not in arguments:
        return arguments, []
    end = arguments.index("--")
    return arguments[:end], arguments[end + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="sbn", description="Pretraining of Sparse-BitNet language models.")
    parser.add_argument("--version", action="version", version=f"megatron_sbn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        *(train.add_quickstart, prepare.add_prepare, train.add_train),
        *(sweep.add_sweep, slurm.add_submit, keys.add_keys),
        *(runs.add_status, runs.add_logs, runs.add_cancel),
        *(check.add_plan, check.add_doctor, check.add_checkpoint),
        *(results.add_compare, results.add_report, results.add_sync),
    ):
        add(commands)
    return parser
