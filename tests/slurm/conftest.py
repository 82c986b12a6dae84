"""One Slurm for all tests of this folder; without Slurm they are skipped, with the reason.

Where SBN_REQUIRE_SLURM=1 (.ci/run) they fail instead: a Slurm that is not there must not look like tests that passed.
"""

import os
from collections.abc import Iterator

import pytest
from cluster import Cluster, missing


@pytest.fixture(scope="session")
def slurm() -> None:
    """Its programs are here."""
    if reason := missing():
        if os.environ.get("SBN_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(slurm: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A controller and the nodes n1 and n2."""
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running
