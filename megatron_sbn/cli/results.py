"""`sbn sync`, `sbn compare` and `sbn report`: what finished runs say."""

import argparse
from pathlib import Path

from megatron_sbn.cli.options import Commands, add_command


def sync(options: argparse.Namespace) -> int:
    """Delivers what a run folder holds and MLflow does not."""
    from megatron_sbn.tracking.tracker import sync as deliver

    for folder in options.run_folders:
        print(f"{folder}: delivered to MLflow run {deliver(Path(folder), options.uri)}")
    return 0


def compare(options: argparse.Namespace) -> int:
    """Prints runs side by side."""
    from megatron_sbn.analysis.compare import report
    from megatron_sbn.runs.finished_run import read_run

    runs = [read_run(Path(folder)) for folder in options.run_folders]
    if options.csv:
        from megatron_sbn.analysis.report import runs_csv
        from megatron_sbn.atomic_files import write_atomically

        write_atomically(Path(options.csv), runs_csv(runs).encode())
    print(report(runs))
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


def add_sync(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "sync", sync, "deliver a run folder's metrics to MLflow, each once")
    command.add_argument("run_folders", nargs="+", metavar="RUN", help="run folder")
    command.add_argument("--uri", help="MLflow server (default: the one of the run's recipe)")
    command.epilog = "example: sbn sync runs/quickstart-ternary-* --uri http://mlflow.example:5000"


def add_compare(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "compare", compare, "compare runs: recipes, metrics at equal tokens and FLOPs")
    command.add_argument("run_folders", nargs="+", metavar="RUN", help="run folder")
    command.add_argument("--csv", metavar="FILE", help="also write a line a run, as sbn report does")
    command.epilog = "example: sbn compare runs/quickstart-ternary-6of8-* runs/quickstart-dense-bf16-*"


def add_report(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "report", report, "write a study's report: Markdown, CSV and figures")
    command.add_argument("study", metavar="STUDY", help="folder of run folders, or with --uri a study's name")
    command.add_argument("--uri", help="read the study's runs from this MLflow instead")
    place = "where the report goes (default: STUDY/report, with --uri STUDY-report)"
    command.add_argument("--output", metavar="FOLDER", help=place)
    command.add_argument("--attach", action="store_true", help="make all of it artifacts of the study's run in MLflow")
    command.epilog = (
        "example: sbn report runs/n-of-8-tiny\n"
        "         sbn report n-of-8-tiny --uri http://mlflow.example:5000 --attach"
    )
