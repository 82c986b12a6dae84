"""Where MLflow keeps a run: the recipe's word, else the site's (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME), else one
database for all runs of a project.

    runs/NAME, runs/STUDY/NAME   ->  runs/mlflow.db: the first folder of run_dir below the working folder
    elsewhere/STUDY/NAME         ->  elsewhere/mlflow.db, for a run of that study; else beside the run folder

A run that is continued stays in the database that it is in. Imports neither mlflow nor torch.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_sbn.config import Recipe
from megatron_sbn.errors import InputError, RecipeError
from megatron_sbn.redaction import excerpt, mask_secrets
from megatron_sbn.runs.folder import TRACKING
from megatron_sbn.runs.tracking_record import read_record
from megatron_sbn.tracking.sqlite_file import database_file, database_uri

URI_VARIABLE, EXPERIMENT_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
EXPERIMENT = "megatron_sbn"
_STORES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks", "databricks-uc", "uc")


@dataclass(frozen=True)
class Destination:
    """An MLflow tracking URI, and an experiment's name there."""

    uri: str
    experiment: str

    @property
    def open_command(self) -> str:
        """The shell command that serves it, or the server's own address; secrets masked."""
        shown = mask_secrets(self.uri)
        if shown.startswith("http"):
            return shown
        return f"mlflow server --backend-store-uri {shown} --workers 1 --port 5000"

    def link(self, experiment_id: str) -> str:
        """The run list in a browser, in MLflow 3's mode for training: another mode opens at traces."""
        shown = mask_secrets(self.uri).rstrip("/")
        server = shown if shown.startswith("http") else "http://localhost:5000"
        return f"{server}/#/experiments/{experiment_id}?workflowType=machine_learning"


def destination(recipe: Recipe, run: Path) -> Destination:
    """Where the run of this folder is tracked. Raises RecipeError for what no MLflow can be."""
    tracking = recipe.tracking
    uri, experiment = tracking.uri, tracking.experiment
    names = ("tracking.uri", "tracking.experiment")
    if uri is None and os.environ.get(URI_VARIABLE):
        uri, names = os.environ[URI_VARIABLE], (f"environment variable {URI_VARIABLE}", names[1])
    if experiment is None:
        experiment = os.environ.get(EXPERIMENT_VARIABLE) or EXPERIMENT
    if uri is None:
        return Destination(_known(run) or database_uri(_home(recipe, run) / "mlflow.db"), experiment)
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in _STORES:
        raise RecipeError(
            f"{names[0]} = {excerpt(uri)}: is no tracking URI of MLflow; give http://SERVER:5000, or a database "
            "such as sqlite:///runs/mlflow.db (leave it out: one database beside the runs)"
        )
    return Destination(uri, experiment)


def _home(recipe: Recipe, run: Path) -> Path:
    run, here = run.absolute(), Path.cwd()
    if run.is_relative_to(here):
        inside = run.relative_to(here).parts
        return here / inside[0] if len(inside) > 1 else here
    return run.parent.parent if run.parent.name == recipe.tracking.study else run.parent


def _known(run: Path) -> str | None:
    """The SQLite database that the run is in, if it is still there."""
    try:
        uri = read_record(run / TRACKING).uri
    except InputError:
        return None
    database = database_file(uri)
    return uri if database is not None and database.exists() else None
