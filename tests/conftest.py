"""Where tests run: Triton interpreted if there is no GPU, and no file of the user's is read or written."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported
os.environ.setdefault("SBN_KERNELS_CACHE", tempfile.mkdtemp(prefix="sbn-kernels-"))


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
