"""Where tests run: Triton interpreted if there is no GPU, and no file of the user's is read or written.

With workers (pytest-xdist, `-n 2 --dist loadgroup`) a file's tests stay together, since they share runs and fixtures;
all that start ranks are one group, so that there are never ranks of two tests at once.
"""

import os
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported
os.environ.setdefault("SBN_KERNELS_CACHE", tempfile.mkdtemp(prefix="sbn-kernels-"))
# Files and folders whose tests start ranks.
WITH_RANKS = "distributed/ training/ durability/ slurm/ test_doctor.py".split()


def group_of(path: Path) -> str:
    """What is run by one worker, in order."""
    name = path.relative_to(Path(__file__).parent).as_posix()
    return "ranks" if name.startswith(tuple(WITH_RANKS)) else name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps a file's tests together; skips what needs a GPU, with the reason."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group_of(item.path)))
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
