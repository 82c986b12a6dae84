"""docs/cli.md: every command with its arguments, whatever the terminal is."""

import argparse
from pathlib import Path

import pytest

from megatron_sbn.cli.main import _parser
from megatron_sbn.cli.reference import _row, _usage, markdown

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


@pytest.mark.parametrize("columns", ["20", "80", "300"])
def test_the_page_is_what_the_parsers_have(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert PAGE.read_text() == markdown(), "python -m megatron_sbn.cli.reference >docs/cli.md"


def test_every_command_and_option_is_there() -> None:
    page = markdown()
    (commands,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert len(commands.choices) > 10
    assert [name for name in commands.choices if f"## sbn {name}\n" not in page and f"## sbn {name} " not in page] == []
    options = {flag for command in commands.choices.values() for flag in command._option_string_actions}
    assert [flag for flag in options - {"-h", "--help"} if f"| `{flag}" not in page] == []


def test_usage_and_defaults() -> None:
    parser = argparse.ArgumentParser(prog="x")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--one", type=int, default=0, help="a number")
    either.add_argument("--two", nargs="?", metavar="N", help="another (default: as many as there are)")
    parser.add_argument("--more", action="append", default=[], help="words")
    parser.add_argument("file", metavar="FILE", help="a file (default: none) to read")
    assert _usage("x", parser) == ["x FILE [--one ONE | --two [N]] [--more MORE]"]
    assert [_row(action) for action in parser._actions[1:]] == [
        ("`--one ONE`", "0", "a number"),
        ("`--two [N]`", "as many as there are", "another"),
        ("`--more MORE`", "", "words; may be given several times"),
        ("`FILE`", "(required)", "a file (default: none) to read"),
    ]
