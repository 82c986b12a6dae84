"""The backends that tests of the reference's contract run on."""

from collections.abc import Iterator
from types import MappingProxyType

import pytest
from sbn_kernels import registry


@pytest.fixture(scope="module", params=["reference", "cpu"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a module's tests once with each backend of CPU tensors standing behind "auto"."""
    before = registry._BY_DEVICE
    registry._BY_DEVICE = MappingProxyType({"cpu": request.param})
    yield request.param
    registry._BY_DEVICE = before
