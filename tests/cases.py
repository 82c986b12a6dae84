"""Lists of cases of which some are quick; the others wait for `make test-rest` (CONTRIBUTING.md)."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def cases(
    values: Iterable[Any],
    quick: Collection[Any],
    several: bool = False,
    mark: pytest.MarkDecorator = pytest.mark.slow,
) -> list[Any]:
    """For `parametrize`, in their order, those that are not quick marked. A value is one argument, or `several`."""
    return [value if value in quick else pytest.param(*(value if several else [value]), marks=mark) for value in values]


def kernel_cases(values: Iterable[Any], quick: Collection[Any], several: bool = False) -> list[Any]:
    """The same for kernels, of which a GPU runs all."""
    return cases(values, quick, several, pytest.mark.slow_on_cpu)
