"""A log gets a line now and then, a terminal a bar."""

import io
import time

import pytest

from megatron_sbn.data.progress import Progress, elapsed
from megatron_sbn.data.tokenizer import train_model


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_in_a_log(capfd):
    with Progress(2_000_000, "reading", interval=0.0) as progress:
        progress.advance(500_000, "1 document")
        progress.advance(1_500_000, "2 documents")
    assert capfd.readouterr().err.splitlines() == [
        "reading: 25% of 2.0 MB, 1 document",
        "reading: 100% of 2.0 MB, 2 documents",
        "reading: 100% of 2.0 MB, 2 documents",
    ]


def test_few_lines_in_a_log(capfd):
    with Progress(1000, "reading") as progress:
        for number in range(1000):
            progress.advance(1, f"{number} documents")
    assert capfd.readouterr().err == "reading: 100% of 0.0 MB, 999 documents\n"


def test_a_failure_is_not_the_end(capfd):
    def fail():
        with Progress(1000, "reading") as progress:
            progress.advance(1, "1 document")
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fail()
    assert capfd.readouterr().err == ""


def test_bar_on_a_terminal(monkeypatch):
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress(2_000_000, "reading") as progress:
        progress.advance(2_000_000, "2 documents")
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("reading: 100%|")
    assert "2.00M/2.00M" in last
    assert "2 documents" in last


def test_what_cannot_be_counted_says_that_it_goes_on(capsys):
    with elapsed("work", interval=0.05):
        time.sleep(0.4)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "work"
    assert lines[1] == "work: 0 s"
    assert lines[-1] == "work: done in 0 s"


def test_a_failure_is_not_done(capsys):
    with pytest.raises(ValueError, match="broken"), elapsed("work"):
        raise ValueError("broken")
    assert capsys.readouterr().err == "work\n"


def test_training_a_tokenizer_is_told(capsys):
    texts = ["the cat sat on the mat " * 50] * 40
    train_model(texts, 280, spoken=True)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "training a tokenizer of 280 pieces on 0.0 MB with 1 thread"
    assert last.startswith(f"{first}: done in ")
