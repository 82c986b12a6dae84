"""A new SQLite database for MLflow is there whole or not at all."""

import sqlite3
from pathlib import Path

import pytest
from time_limit import LIMIT_SECONDS

from megatron_sbn.runs.metrics_file import MetricsFile
from megatron_sbn.tracking.sqlite_file import artifact_location, database_file, ensure_tables
from megatron_sbn.tracking.tracker import Tracker


def make(uri: str) -> None:
    connection = sqlite3.connect(uri.removeprefix("sqlite:///"))
    connection.execute("create table one (x)")
    connection.close()


def tables(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    names = [name for (name,) in connection.execute("select name from sqlite_master")]
    connection.close()
    return names


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("sqlite:////a/b.db", Path("/a/b.db")),
        ("sqlite:////a/b.db?timeout=5", Path("/a/b.db")),
        ("sqlite:///b.db", Path("b.db").absolute()),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
        ("http://host:5000", None),
    ],
)
def test_where_a_uri_puts_it(uri: str, path: Path | None) -> None:
    assert database_file(uri) == path
    assert artifact_location(uri) == (None if path is None else f"file://{path.parent}/mlartifacts")


def test_a_failure_leaves_no_database_and_what_is_left_of_a_kill_is_no_hindrance(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mlflow.db"

    def killed(uri: str) -> None:
        make(uri)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        ensure_tables(path, killed)
    assert not path.exists()
    ensure_tables(path, make)  # table `one` of the attempt before is gone, or this would fail
    assert tables(path) == ["one"]
    ensure_tables(path, killed)  # there is nothing to make
    assert sorted(file.name for file in path.parent.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def test_a_run_is_delivered_after_a_kill_in_the_middle_of_making_the_tables(tmp_path: Path) -> None:
    """mlflow's own tables, the first few of them, as a killed process leaves them."""
    half = sqlite3.connect(tmp_path / ".mlflow.db.partial")
    half.execute("create table experiments (experiment_id integer)")
    half.execute("create table mcp_servers (name text)")
    half.close()
    run = tmp_path / "run"
    MetricsFile(run / "metrics.jsonl").append(1, {"loss": 1.0})
    tracker = Tracker(run, "run", "study", f"sqlite:///{tmp_path}/mlflow.db", {}, {}, [])
    assert tracker.close("FINISHED", timeout=LIMIT_SECONDS)
    assert {"experiments", "metrics", "mcp_servers"} <= set(tables(tmp_path / "mlflow.db"))
