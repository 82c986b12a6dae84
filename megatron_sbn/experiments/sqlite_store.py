"""MLflow without a server: a SQLite file, and the artifacts in a folder beside it. Imports no mlflow."""

from pathlib import Path


def default_uri(runs_dir: Path) -> str:
    """A database beside the run folders: sqlite:///<absolute runs_dir>/mlflow.db."""
    return f"sqlite:///{runs_dir.absolute()}/mlflow.db"


def database_of(uri: str) -> Path | None:
    """SQLite's file; None for other stores."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


def artifact_location(uri: str) -> str | None:
    """Of a new experiment: for SQLite a folder beside the database; None for a server, which knows its own."""
    database = database_of(uri)
    return None if database is None else (database.parent / "mlartifacts").as_uri()
