"""Which releases of the engines are taken, and how one that is not is refused."""

import logging
import re
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_sbn import engines
from megatron_sbn.errors import RecipeError

SETUP = Path(__file__).parents[1] / "setup.py"


def test_setup_asks_for_the_same_releases() -> None:
    lines = re.findall(r'^ +"(\S+)",$', SETUP.read_text(), re.MULTILINE)
    asked = {Requirement(line).name: Requirement(line).specifier for line in lines}
    for engine, releases in engines.REQUIRED.items():
        assert asked[engine] == Requirement(f"{engine}{releases}").specifier


def test_these_engines_are_taken() -> None:
    engines.check_installed()
    assert set(engines.installed()) == set(engines.REQUIRED)


@pytest.mark.parametrize(
    ("engine", "release", "expected"),
    [
        ("megatron-core", "0.15.2", "megatron-core 0.15.2 is installed; pip install 'megatron-core>=0.16.1,<0.20'"),
        ("megatron-core", "0.20.0", "megatron-core 0.20.0 is installed"),
        ("megatron-core", "0.19.2", None),
        ("torch", "2.10.0+cu130", "torch 2.10.0+cu130 is installed; pip install 'torch>=2.11'"),
        ("torch", "2.11.0a0+nv26.01", None),
        ("torch", "unknown", "torch has the release 'unknown'; pip install 'torch>=2.11'"),
        ("torch", "2.13.0-custom-build", "torch has the release '2.13.0-custom-build'"),
        ("deepspeed", None, "deepspeed is not installed; pip install 'deepspeed>=0.19.8,<0.20'"),
    ],
)
def test_another_release_is_one_line(
    engine: str, release: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engines.version

    def version(name: str) -> str:
        if name == engine and release is None:
            raise PackageNotFoundError(name)
        return release if name == engine and release is not None else real(name)

    monkeypatch.setattr(engines, "version", version)
    if expected is None:
        engines.check_installed()
        return
    with pytest.raises(RecipeError) as error:
        engines.check_installed()
    assert str(error.value).startswith(expected)


def test_warnings_that_nobody_can_act_on_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        engines.quiet_engines()
        engines.quiet_engines()
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED. Use another.")
    logger.warning("the vocabulary is too small")
    assert [record.message for record in caplog.records] == ["the vocabulary is too small"]


@pytest.mark.parametrize(
    ("release", "named"),
    [("0.16.1", False), ("0.17.1", False), ("0.18.0rc1", True), ("0.18.2", True), ("0.19.0.dev3", True)],
)
def test_a_build_before_a_release_counts_as_that_release(
    release: str, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "version", lambda name: release)
    assert engines.megatron_core_is_at_least("0.18") == named
