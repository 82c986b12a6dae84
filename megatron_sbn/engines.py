"""The releases of PyTorch, Triton, Megatron-Core and DeepSpeed that this project runs on, and how they differ.

What differs between the releases of Megatron-Core in `REQUIRED`, and where each difference is met:

    0.16   the router's product asks for a Transformer Engine function by name     layers/experts.py, Router.gating
    0.18   modules have names: a mixture hands `name` to its experts               layers/experts.py, Experts
    0.18   a layer calls the builder of its MLP instead of reading a ModuleSpec    layers/spec.py, layer_spec
    0.19   GPTModel logs that HybridModel replaces it; 0.16 has no HybridModel     quiet_engines, below

Reads package metadata; imports no engine.
"""

import logging
import warnings
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from megatron_sbn.errors import RecipeError

REQUIRED = {"torch": ">=2.11", "triton": ">=3.6", "megatron-core": ">=0.16.1,<0.20", "deepspeed": ">=0.19.8,<0.20"}


def installed() -> dict[str, str]:
    """The release of every engine; one that is not installed is left out."""
    found = {}
    for engine in REQUIRED:
        try:
            found[engine] = version(engine)
        except PackageNotFoundError:
            continue
    return found


def check_installed() -> None:
    """Raises RecipeError, naming the engine and the releases that it may have, where one is missing or another."""
    found = installed()
    for engine, releases in REQUIRED.items():
        if engine not in found:
            raise RecipeError(f"{engine} is not installed; pip install '{engine}{releases}'")
        try:
            fits = _release(found[engine]) in SpecifierSet(releases)
        except (InvalidVersion, TypeError):
            raise RecipeError(f"{engine} has the release {found[engine]!r}; pip install '{engine}{releases}'") from None
        if not fits:
            raise RecipeError(f"{engine} {found[engine]} is installed; pip install '{engine}{releases}'")


def megatron_core_is_at_least(release: str) -> bool:
    """Whether the installed Megatron-Core is `release` or a later one."""
    return _release(version("megatron-core")) >= Version(release)


def _release(text: str) -> Version:
    """The release that a build is of. Images carry builds of the days before one, such as 2.11.0a0+nv26.01."""
    return Version(Version(text).base_version)


def quiet_engines() -> None:
    """Drops warnings that no user of a recipe can act on: optional packages and models that are not used here."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(_is_not_its_deprecation)


def _is_not_its_deprecation(record: logging.LogRecord) -> bool:
    return "GPTModel IS DEPRECATED" not in record.getMessage()
