"""`sbn status`, `sbn logs` and `sbn cancel`: runs that train, wait or have ended."""

import argparse
import sys
import time
from pathlib import Path

from megatron_sbn.cli.options import Commands, add_command
from megatron_sbn.errors import InputError

POLL_SECONDS = 0.5


def status(options: argparse.Namespace) -> int:
    """Prints a table of runs."""
    from megatron_sbn.cluster.run_states import run_folders, table
    from megatron_sbn.runs.folder import RUNS

    folders = run_folders(options.runs)
    print(
        "\n".join(table(folders)) if folders else f"no runs in {RUNS.absolute()}; name the folder of a run or a study"
    )
    return 0


def logs(options: argparse.Namespace) -> int:
    """Prints what rank 0 said."""
    from megatron_sbn.cluster.run_states import is_there
    from megatron_sbn.runs.folder import LOGS

    folder = Path(options.folder)
    if not is_there(folder):
        raise InputError(f"{folder}: is not there; name the folder of a run")
    log = folder / LOGS / "rank-0.log"
    others = sorted(path for path in (folder / LOGS).glob("*") if path != log)
    if not options.follow and not is_there(log):
        written = f"; see {', '.join(map(str, others))}" if others else ", and no other log"
        raise InputError(f"{log}: is not there{written}")
    if others:
        print(f"also: {' '.join(map(str, others))}", file=sys.stderr, flush=True)
    _print(log, folder, follow=options.follow)
    return 0


def _print(log: Path, folder: Path, *, follow: bool) -> None:
    """The log, and with `follow` what is added until the run is over."""
    from megatron_sbn.runs.status import read_status

    offset = 0
    while True:
        known = read_status(folder)
        over = not follow or (known is not None and known.state != "RUNNING")
        try:
            with log.open("rb") as file:
                file.seek(offset)
                added = file.read()
        except FileNotFoundError:
            added = b""
        offset += len(added)
        sys.stdout.write(added.decode("utf-8", errors="replace"))
        sys.stdout.flush()
        if (over and not added) or not follow:
            return
        time.sleep(POLL_SECONDS)


def cancel(options: argparse.Namespace) -> int:
    """Asks runs to stop."""
    from megatron_sbn.cluster.cancel import cancel as ask
    from megatron_sbn.cluster.run_states import run_folders

    failed = 0
    for folder in run_folders(options.runs):
        try:
            print(ask(folder), flush=True)
        except InputError as error:
            print(f"sbn: {error}", file=sys.stderr)
            failed = error.status
    return failed


def add_status(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "status", status, "how runs stand: state, step, loss, perplexity, Slurm job")
    named = "folders of runs or of studies (default: all below runs/)"
    command.add_argument("runs", nargs="*", metavar="RUN", help=named)
    command.epilog = "example: sbn status\n         sbn status runs/n-of-8-tiny"


def add_logs(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "logs", logs, "print what rank 0 of a run printed, and name the other logs")
    command.add_argument("folder", metavar="RUN", help="folder of a run")
    command.add_argument("--follow", action="store_true", help="go on with what is added, until the run is over")
    command.epilog = "example: sbn logs runs/first --follow"


def add_cancel(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "cancel", cancel, "ask runs to stop: scancel of a Slurm job, else a STOP file")
    command.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, or of studies for all of their runs")
    command.epilog = "example: sbn cancel runs/first"
