"""MLflow's SQLite file: where a URI puts it, and its tables, which are there as a whole or not at all. No mlflow here.

mlflow makes its tables one by one and cannot go on where a killed process left them ("table already exists"), so a new
database is made under another name and renamed. Whoever comes first makes it; the others wait.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, unquote

from megatron_sbn.atomic_files import in_turn, partial_path

_SCHEME = "sqlite:///"


def database_uri(path: Path) -> str:
    """sqlite:///<absolute path>; what would end the path in a URI is escaped, as SQLAlchemy reads it."""
    return _SCHEME + quote(str(path.absolute()), safe="/:@!$&'()*+,;= ~")


def database_file(uri: str) -> Path | None:
    """The file of a sqlite:/// URI, absolute; None for other stores."""
    path = uri.removeprefix(_SCHEME).partition("?")[0]
    return Path(unquote(path)).absolute() if uri.startswith(_SCHEME) and path not in ("", ":memory:") else None


def artifact_location(uri: str) -> str | None:
    """For SQLite a folder beside the database; a server knows its own."""
    database = database_file(uri)
    return None if database is None else (database.parent / "mlartifacts").as_uri()


def ensure_tables(path: Path, make: Callable[[str], object]) -> None:
    """Makes the database if it is not there: `make` makes the tables of a database by its URI.

    Raises OSError where it cannot be written, and what `make` raises; then there is no database.
    """
    with in_turn(path.with_name(f"{path.name}.lock")):
        if path.exists() and path.stat().st_size:
            return
        partial = partial_path(path)
        for left_behind in (partial, Path(f"{partial}-journal")):
            left_behind.unlink(missing_ok=True)
        make(database_uri(partial))
        partial.replace(path)
    remove_stray_folder(path)


def remove_stray_folder(path: Path) -> None:
    """mlflow makes a folder of the escaped name beside the database's, where its path has to be escaped in a URI."""
    stray = Path(database_uri(path).removeprefix(_SCHEME)).parent
    if stray != path.absolute().parent:
        with contextlib.suppress(OSError):
            stray.rmdir()
