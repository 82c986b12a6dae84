"""What the options of several subcommands share: how a command is added, numbers, overrides, Slurm's time limits."""

import argparse
import difflib
import re
from typing import NoReturn, TypeAlias

from megatron_sbn.redaction import excerpt, one_line


class Parser(argparse.ArgumentParser):
    """What it complains about is shown as in every other message: no passwords, on one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message, with the nearest word for one that is no command, and leaves with status 2."""
        wrong = re.fullmatch(r"argument (?:COMMAND|VERB|action): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong is not None:
            known = re.findall(r"[\w-]+", wrong[2])
            near = difflib.get_close_matches(wrong[1], known, n=1)
            way_out = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(known)}"
            message = f"{excerpt(wrong[1])} is not a command; {way_out}"
        super().error(one_line(message))


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_command(commands: Commands, name: str, run: object, text: str) -> argparse.ArgumentParser:
    """A subcommand whose function is `run`; `text` is its help."""
    formatter = argparse.RawDescriptionHelpFormatter
    command = commands.add_parser(name, help=text, description=text, formatter_class=formatter)
    command.set_defaults(run=run)
    return command


def add_overrides(command: argparse.ArgumentParser) -> None:
    """section.key=value words."""
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")


def positive(text: str) -> int:
    """A whole number from 1 to 999,999,999."""
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{excerpt(text)} is not a whole number from 1 to 999,999,999")
    return int(text)


def time_limit(text: str) -> str:
    """As sbatch takes it."""
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write HH:MM:SS or DAYS-HH:MM:SS")
    return text


def add_job_options(command: argparse.ArgumentParser) -> None:
    """--time, --dry-run and sbatch's own options, after a --, of what goes to Slurm."""
    own = "sbatch's options, as they are, after all others: -- --partition=gpu --exclusive"
    command.add_argument("sbatch", nargs="*", metavar="-- OPTION", help=own)
    command.add_argument("--time", type=time_limit, metavar="HH:MM:SS", help="limit of a job (default: the site's)")
    command.add_argument("--dry-run", action="store_true", help="show what would be written and submitted, do nothing")
