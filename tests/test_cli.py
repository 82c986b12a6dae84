"""The command line itself: what it takes, and one line for what it does not."""

from pathlib import Path

import pytest

from megatron_sbn.cli import main


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
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == r"sbn: error: unknown: --uro http://***@host \x1b[2J\n"
