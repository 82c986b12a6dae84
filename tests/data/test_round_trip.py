"""What a tokenizer loses is counted, said in one line, and kept in the manifest."""

import json
from pathlib import Path

import pytest
import sentencepiece

from megatron_sbn.cli import main
from megatron_sbn.data.corpus import PrepareOptions, prepare
from megatron_sbn.data.round_trip import RoundTrip, try_round_trip, what_is_lost
from megatron_sbn.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def normalizing(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Tokenizer:
    """sentencepiece as its defaults train it: newlines, tabs and runs of spaces become a space, no byte fallback."""
    path = tmp_path_factory.mktemp("normalizing") / "t.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_prefix=str(path.with_suffix("")), vocab_size=50, minloglevel=3
    )
    return Tokenizer(path)


def test_a_tokenizer_of_ours_loses_nothing(tokenizer: Tokenizer, documents: list[str]) -> None:
    trip = try_round_trip(tokenizer, [*documents, "\u4e00 \u2581"])
    assert (trip.documents, trip.changed, trip.lost, trip.example) == (51, 0, 0, "")
    assert what_is_lost("t.model", trip, 0, 100) == ""


def test_characters_that_do_not_come_back(normalizing: Tokenizer) -> None:
    trip = try_round_trip(normalizing, ["the cat", "the\n\tcat", "the cat \u4e00\u4e01"])
    assert (trip.documents, trip.changed, trip.characters) == (3, 2, 7 + 8 + 10)
    assert trip.lost == 2 + 2  # the newline and the tab; two characters that the model does not have
    assert trip.example == "'\\n\\tcat' -> ' cat'"


def test_the_line(normalizing: Tokenizer) -> None:
    line = what_is_lost("t.model", RoundTrip(1000, 30, 10_000, 25, "'a' -> 'b'"), 7, 1000)
    assert line == (
        "t.model: loses text: 7 unknown tokens (0.7%); 30 of 1,000 documents tried do not come back as they were "
        "(3.0%), 0.25% of their characters are lost, such as 'a' -> 'b'; --vocab-size in place of --tokenizer trains "
        "one that does not"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_says_and_keeps_what_is_lost(
    normalizing: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    texts = ["the cat", "the\tcat", "\u4e00 cat \u4e01 the", ""]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "o"), "--workers", str(workers)]
    assert main(["prepare", *words, "--tokenizer", str(normalizing.path)]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith(f"sbn: warning: {normalizing.path}: loses text: 2 unknown tokens (")
    assert "2 of 3 documents tried do not come back" in line
    manifest = json.loads((tmp_path / "o.json").read_text())
    assert manifest["unknown_tokens"] == 2
    assert manifest["round_trip"] == {"documents": 3, "changed": 2, "characters": 7 + 7 + 11, "lost": 3}


def test_a_tokenizer_that_loses_nothing_is_not_mentioned(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("the\tcat \u4e00")
    words = ["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "o"), "--workers", "1"]
    assert main(["prepare", *words, "--tokenizer", str(tokenizer.path)]) == 0
    assert "warning" not in capsys.readouterr().err
    assert json.loads((tmp_path / "o.json").read_text())["round_trip"]["changed"] == 0


def test_the_sample_is_spread_over_the_files(normalizing: Tokenizer, tmp_path: Path) -> None:
    for number in range(3):
        lines = (json.dumps({"text": f"cat {number} {line}"}) + "\n" for line in range(600))
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    report = prepare(PrepareOptions((f"{tmp_path}/*.jsonl",), tmp_path / "o", tokenizer=normalizing.path))
    assert report.round_trip is not None
    assert report.round_trip.documents == 1000
