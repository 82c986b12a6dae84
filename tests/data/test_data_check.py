"""What is known of a recipe's data before torch is imported; what has no manifest is not checked."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_sbn.cli import main
from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.data.corpus import PrepareOptions, prepare
from megatron_sbn.data.data_check import QUICKSTART_DATA, check_data
from megatron_sbn.data.index_header import shard_tokens
from megatron_sbn.data.manifest import shard_facts
from megatron_sbn.data.shards import Shard, ShardWriter
from megatron_sbn.errors import InputError

MODEL = "num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, seq_length: 16, vocab_size: 340"
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: list[str]) -> Path:
    """A folder with text, tokenizers `own` and `other`, their shards, and a shard of Megatron's own."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    for name, size in (("own", 340), ("other", 330)):
        prepare(PrepareOptions(("a.jsonl",), Path(name), vocab_size=size, validation_fraction=0.2))
    writer = ShardWriter(Path("foreign.bin"), Path("foreign.idx"), 340)
    writer.add(np.arange(100))
    writer.finish()
    return tmp_path


def recipe(data: str, *overrides: str) -> Recipe:
    text = f"name: a\nmodel: {{{MODEL}}}\ntraining: {{steps: 3, global_batch_size: 2, micro_batch_size: 2}}\n"
    Path("a.yaml").write_text(f"{text}data: {{{data}}}\n")
    return load_recipe("a.yaml", overrides)


OWN = "train: own-train, validation: own-validation, tokenizer: own.model"


@pytest.mark.parametrize(
    "data",
    [
        OWN,
        "train: own-train",
        "train: foreign",
        "train: foreign, tokenizer: other.model",
        "train: [own-train, foreign], validation: own-validation",
    ],
)
def test_what_belongs_together_is_taken(here: Path, data: str) -> None:
    assert check_data(recipe(data)) == []


REFUSED = (
    ("train: none", InputError, "data.train: none.idx: no such token shard; `sbn prepare` writes one"),
    (f"train: {QUICKSTART_DATA}/stdlib-train", InputError, "no such token shard; `sbn quickstart --prepare-only`"),
    ("train: own-train.bin", InputError, "no such token shard; name the shard without .bin"),
    ("train: own-train, validation: none", InputError, "data.validation: none.idx: no such token shard"),
    ("train: 'a\\0b'", InputError, "no such token shard"),
    ("train: foreign, tokenizer: none.model", InputError, "data.tokenizer = none.model: no such file; name the"),
    (
        "train: own-train, tokenizer: other.model",
        InputError,
        r"data.train: own-train was made with another tokenizer, own.model \(sha256 \w{12}\), than data.tokenizer = "
        r"other.model \(sha256 \w{12}\); name the one that made it, or prepare the text again",
    ),
    (
        "train: [own-train, other-train]",
        InputError,
        r"data.train: other-train was made with another tokenizer, other.model .* than data.train = own-train "
        r"\(own.model\)",
    ),
    (
        "train: own-train, validation: own-train",
        InputError,
        "data.validation = own-train holds the same tokens as data.train = own-train: .* --validation-fraction",
    ),
    ("train: foreign, validation: ./foreign", InputError, "data.validation = ./foreign holds the same tokens"),
)


@pytest.mark.parametrize(("data", "kind", "message"), REFUSED)
def test_what_is_refused(here: Path, data: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        check_data(recipe(data.replace("'a\\0b'", '"a\\0b"')))


def test_the_vocabulary_of_the_model(here: Path) -> None:
    with pytest.raises(InputError, match=r"model.vocab_size = 339 is smaller than the 340 .* set model.vocab_size=340"):
        check_data(recipe(OWN, "model.vocab_size=339"))
    assert check_data(recipe(OWN, "model.vocab_size=680")) == []
    (line,) = check_data(recipe(OWN, "model.vocab_size=681"))
    assert line.startswith("model.vocab_size = 681 is more than 2 times the 340 of the tokenizer that made own-train")
    assert check_data(recipe("train: foreign", "model.vocab_size=20")) == []


def test_copies_and_parts(here: Path) -> None:
    for suffix in ("bin", "idx"):
        shutil.copy(f"own-train.{suffix}", f"copy.{suffix}")
    with pytest.raises(InputError, match="data.validation = copy holds the same tokens as data.train = own-train"):
        check_data(recipe("train: own-train, validation: copy"))
    (line,) = check_data(recipe("train: [foreign, own-train], validation: copy"))
    assert line.startswith("data.validation = copy holds the same tokens as data.train = own-train, a part of what is")
    content = bytearray(Path("copy.bin").read_bytes())
    content[-1] ^= 1
    Path("copy.bin").write_bytes(content)
    assert check_data(recipe("train: own-train, validation: copy")) == []


def test_a_shard_that_is_not_the_described_one_is_not_checked(here: Path) -> None:
    for suffix in ("bin", "idx"):
        shutil.copy(f"foreign.{suffix}", f"own-train.{suffix}")
    assert shard_facts("own-train") is None
    assert check_data(recipe("train: own-train, tokenizer: other.model")) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {}}', '{"files": 3}', "[" * 100_000])
def test_a_manifest_of_another_form_says_nothing(here: Path, text: str) -> None:
    Path("foreign.json").write_text(text)
    assert shard_facts("foreign") is None
    assert check_data(recipe("train: foreign")) == []


def test_a_manifest_of_an_earlier_release(here: Path) -> None:
    manifest = json.loads(Path("own.json").read_text())
    for split in manifest["splits"].values():
        split.pop("text_bytes", None)
    Path("own.json").write_text(json.dumps(manifest))
    facts = shard_facts("own-validation")
    assert facts is not None
    assert (facts.vocab_size, facts.text_bytes, facts.bytes_per_token) == (340, None, None)
    assert facts.tokens == Shard("own-validation").tokens == shard_tokens("own-validation")


def test_no_torch_and_no_time(here: Path) -> None:
    for number in range(300):
        for suffix in ("bin", "idx"):
            Path(f"s{number}.{suffix}").symlink_to(f"foreign.{suffix}")
    data = f"train: [{', '.join(f's{number}' for number in range(300))}], validation: own-validation"
    made = recipe(data)
    began = time.monotonic()
    assert check_data(made) == []
    assert time.monotonic() - began < 5
    script = (
        "import sys; from megatron_sbn.config import load_recipe; from megatron_sbn.data.data_check import check_data\n"
        "check_data(load_recipe('a.yaml'))\nassert not {'torch', 'megatron', 'sentencepiece'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("words", [["train"], ["doctor"]])
def test_commands_refuse_in_one_line(here: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    recipe("train: own-train, tokenizer: other.model")
    assert main([*words, "a.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sbn: data.train: own-train was made with another tokenizer")
    assert error.count("\n") == 1


def test_a_warning_stops_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(OWN)
    assert main(["doctor", "a.yaml", "model.vocab_size=2048"]) == 0
    assert capsys.readouterr().err.startswith("sbn: warning: model.vocab_size = 2048 is more than 2 times the 340")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a Megatron index"),
        (b"MMIDIDX\0\0" + b"\1" + bytes(7) + b"\7" + bytes(16), "dtype code 7 is no integer type"),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.idx").write_bytes(content)
    (tmp_path / "a.bin").write_bytes(b"12")
    with pytest.raises(InputError, match=message):
        shard_tokens(tmp_path / "a")
    with pytest.raises(InputError, match="cannot read the token shard: No such file"):
        shard_tokens(tmp_path / "none")
