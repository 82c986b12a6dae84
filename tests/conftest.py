"""Where tests run: Triton interpreted if there is no GPU, and no file of the user's is read or written.

With workers (pytest-xdist, `-n 2`) a file's tests stay together, since they share runs and fixtures; so do all that
start ranks, and there are never ranks of two tests at once.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from time_limit import LIMIT_SECONDS

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported
os.environ.setdefault("SBN_KERNELS_CACHE", tempfile.mkdtemp(prefix="sbn-kernels-"))
# Files and folders whose tests start ranks.
WITH_RANKS = "distributed/ training/ durability/ slurm/ doctor/".split()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What one worker runs, in order: the tests of a file, or all that start ranks."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0].removeprefix("tests/")
            return "ranks" if file.startswith(tuple(WITH_RANKS)) else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU, with the reason."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test module's RECIPE, as a file."""
    path = tmp_path_factory.mktemp("recipes") / "base.yaml"
    path.write_text(request.module.RECIPE)
    return path


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables take seconds to make: once for all tests."""
    from mlflow import MlflowClient

    from megatron_sbn.tracking.sqlite_file import database_uri

    folder = tmp_path_factory.mktemp("database")
    MlflowClient(database_uri(folder / "mlflow.db")).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def uri(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of an MLflow database of the test's own, in its folder; a busy machine has longer than a run has to deliver."""
    from megatron_sbn.tracking.sqlite_file import database_uri
    from megatron_sbn.tracking.tracker import Tracker

    monkeypatch.setattr(Tracker.close, "__defaults__", (LIMIT_SECONDS,))

    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return database_uri(tmp_path / "mlflow.db")
