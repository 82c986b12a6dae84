"""docs/cli.md: every command and verb of `sbn`, read off its parsers, so it cannot be out of date.

    python -m megatron_sbn.cli.reference >docs/cli.md

The text is made from the parsers' actions, not from argparse's own help, whose layout changes with the width of the
terminal and the release of Python. The table of exit statuses is that of errors.py.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from megatron_sbn import errors
from megatron_sbn.cli.main import _parser

_TITLE = """# The command line

Every command of `sbn`; `sbn COMMAND --help` says the same. `python -m megatron_sbn.cli.reference >docs/cli.md` writes
this page, and a test keeps it equal.
"""
_STATUSES = """## Exit statuses

A command that says nothing else about its exit status uses these. A failure is one line on standard error, `sbn: ...`.
`sbn train` passes on the status of the first rank that failed; torchrun answers 1 for every failure.
"""
_HEADER = ("argument", "default", "meaning")
_DEFAULT = re.compile(r"(?:^| \()default: ([^)]+)\)?$")
_Command: TypeAlias = tuple[str, str, argparse.ArgumentParser]  # name, help, parser
_EXITS = re.compile(r"^exit status: (.+)$", re.MULTILINE)


def markdown() -> str:
    """docs/cli.md."""
    found = list(_commands("sbn", "", _parser()))
    lines = [_TITLE, *_table(("command", "what it does"), [(f"[`{n}`](#{_anchor(n)})", t) for n, t, _ in found])]
    lines += ["", _STATUSES, *_status_table()]
    for name, text, parser in found:
        lines += ["", f"## {name}", "", f"{text[:1].upper()}{text[1:]}.", "", "```", *_usage(name, parser), "```"]
        rows = [_row(action) for action in _arguments(parser)]
        lines += ["", *_table(_HEADER, rows)] if rows else []
        lines += _epilog(parser)
    return "\n".join(lines) + "\n"


def _commands(name: str, text: str, parser: argparse.ArgumentParser) -> Iterator[_Command]:
    """Every command; of one with verbs, each verb."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield name, text, parser
    for action in nested:
        for choice in action._choices_actions:
            yield from _commands(f"{name} {choice.dest}", choice.help or "", action.choices[choice.dest])


def _arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Positional arguments first, as they are best written: an option with several values would take them."""
    own = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    last = [a for a in own if str(a.metavar).startswith("-- ")]  # for another program
    return [a for a in own if not a.option_strings and a not in last] + [a for a in own if a.option_strings] + last


def _usage(name: str, parser: argparse.ArgumentParser) -> list[str]:
    """The command with all that it takes, in one line or, where that is long, one for each argument."""
    groups = {id(member): group for group in parser._mutually_exclusive_groups for member in group._group_actions}
    words, seen = [name], set()
    for action in _arguments(parser):
        group = groups.get(id(action))
        if group is None:
            words.append(_spelled(action) if _required(action) else f"[{_spelled(action)}]")
        elif id(group) not in seen:
            seen.add(id(group))
            either = " | ".join(_spelled(member) for member in group._group_actions)
            words.append(f"({either})" if group.required else f"[{either}]")
    line = " ".join(words)
    return [line] if len(line) <= 110 else [words[0], *(f"    {word}" for word in words[1:])]


def _spelled(action: argparse.Action) -> str:
    """An argument as it is written, with its values; whether it may be left out is not shown."""
    flag = ", ".join(action.option_strings[:1])
    if action.nargs == 0:
        return flag
    value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else _value(action)
    shown = {"*": f"{value} ...", "+": f"{value} [{value} ...]", "?": f"[{value}]"}.get(str(action.nargs), value)
    return f"{flag} {shown}".strip()


def _value(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    return action.dest.upper() if action.option_strings else action.dest


def _required(action: argparse.Action) -> bool:
    """Also of a positional argument."""
    return action.required and action.nargs not in ("*", "?")


def _row(action: argparse.Action) -> tuple[str, str, str]:
    """Name, default and meaning; a default that the help text tells goes into its own column."""
    meaning = action.help or ""
    told = _DEFAULT.search(meaning)
    plain = isinstance(action.default, int | float | str) and not isinstance(action.default, bool)
    default = told.group(1) if told else str(action.default) if plain else ""
    meaning = _DEFAULT.sub("", meaning)
    if isinstance(action, argparse._AppendAction):
        meaning += "; may be given several times"
    return f"`{_spelled(action)}`", "(required)" if _required(action) else default, meaning


def _epilog(parser: argparse.ArgumentParser) -> list[str]:
    """Examples, and the exit statuses that the command gives a sense of its own."""
    text = parser.epilog or ""
    examples = [line.removeprefix("example:").strip() for line in _EXITS.sub("", text).splitlines()]
    lines = ["", "```", *filter(None, examples), "```"] if any(examples) else []
    return lines + [line for found in _EXITS.findall(text) for line in ("", f"Exit status: {found}.")]


def _status_table() -> list[str]:
    """The one in the docstring of errors.py."""
    return [line for line in (errors.__doc__ or "").splitlines() if line.startswith("|")]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def _anchor(heading: str) -> str:
    """Of a heading, as it is linked to within a page."""
    return heading.replace(" ", "-")


if __name__ == "__main__":
    sys.stdout.write(markdown())
