"""One Slurm for all tests of this folder; without Slurm they are skipped, with the reason."""

from collections.abc import Iterator

import pytest
from cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A controller and the nodes n1 and n2."""
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running
