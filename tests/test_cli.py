"""The command line itself: what it takes, and one line for what it does not."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sbn.cli import main
from megatron_sbn.cli.main import _parser, _split

ROOT = Path(__file__).parents[1]


def test_sync_takes_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"sbn: {tmp_path}/tracking.json: no such file")


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "9" * 30, "\u0663", ""])
def test_counts_are_whole_and_not_endless(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["train", "recipe.yaml", f"--nproc-per-node={text}"])
    assert leaving.value.code == 2
    assert "is not a whole number from 1 to 999,999,999" in capsys.readouterr().err


def test_unknown_words_are_shown_without_secrets_and_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sync", "run", "--uro", "http://someone:hush@host", "\x1b[2J\n"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == r"sbn: error: unknown: --uro http://***@host \x1b[2J\n"


def documented() -> list[str]:
    """Every `sbn ...` line of README, the tutorial, the how-to pages and the examples in --help."""
    pages = [ROOT / "README.md", ROOT / "docs" / "tutorial.md", ROOT / "slurm" / "README.md"]
    pages += sorted((ROOT / "docs" / "howto").glob("*.md"))
    lines = [line for page in pages for line in page.read_text().splitlines()]
    lines += [
        line for module in (ROOT / "megatron_sbn" / "cli").glob("*.py") for line in module.read_text().splitlines()
    ]
    found = [re.search(r"^(?:\$ |\s*\"(?:example: )? *)?(sbn [a-z].*)$", line) for line in lines]
    texts = [match.group(1).partition("  #")[0].rstrip() for match in found if match]
    return sorted({re.sub(r"(\\n)?\"$", "", text).replace("[--dry-run]", "--dry-run") for text in texts})


@pytest.mark.parametrize("line", documented())
def test_a_documented_command_is_understood(line: str) -> None:
    options, rest = _parser().parse_known_args(_split(shlex.split(line)[1:])[0])
    assert callable(options.run)
    assert all("=" in word for word in rest)


def test_many_commands_are_documented() -> None:
    assert len(documented()) > 25


@pytest.mark.parametrize(
    ("word", "way_out"),
    [("trian", "did you mean train?"), ("comapre", "did you mean compare?"), ("zzz", "the commands")],
)
def test_a_command_that_is_none_gets_the_nearest(word: str, way_out: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([word])
    assert end.value.code == 2
    assert f"'{word}' is not a command; {way_out}" in capsys.readouterr().err


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "megatron_sbn", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "megatron_sbn")
