"""tokenizer.json: the library's own ids, no prompt's habits, and the same checks as for sentencepiece."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_sbn.cli import main
from megatron_sbn.data.corpus import PrepareOptions, is_prepared, prepare
from megatron_sbn.data.manifest import shard_facts
from megatron_sbn.data.round_trip import try_round_trip
from megatron_sbn.data.shards import Shard
from megatron_sbn.data.tokenizer import load_tokenizer
from megatron_sbn.data.tokenizer_json import JsonTokenizer
from megatron_sbn.errors import InputError

tokenizers = pytest.importorskip("tokenizers", reason="an optional package")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory, documents):
    """As GPT-2's and Qwen's: BPE over bytes, with a token that ends documents, and habits of prompts."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(documents, trainer)
    made.enable_truncation(5)
    made.enable_padding(length=40)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory, documents):
    """Whole words in lower case, and an unknown token."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=30, special_tokens=["<unk>", "</s>"], show_progress=False)
    made.train_from_iterator(documents, trainer)
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    made.save(str(path))
    return path


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(
        st.one_of(st.text(), st.sampled_from(["<|endoftext|>", "<|im_start|>", "\u2581", "\r\n", "the"]))
    ).map("".join)
)
def test_every_byte_comes_back_and_special_tokens_are_text(byte_level, text):
    tokenizer = JsonTokenizer(byte_level)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1} & set(ids)
    assert tokenizer.encode_array(text).tolist() == ids


def test_what_it_is(byte_level, words):
    tokenizer = load_tokenizer(byte_level)
    assert isinstance(tokenizer, JsonTokenizer)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.unknown) == (340, 0, -1)
    assert load_tokenizer(byte_level, "<|im_start|>").eod == 1
    assert (load_tokenizer(words).eod, load_tokenizer(words).unknown) == (1, 0)
    with pytest.raises(ValueError, match="token id 340 is outside the vocabulary of 340"):
        tokenizer.decode([340])
    with pytest.raises(InputError, match=r"tokenizer.json: has no token <eos> to end documents with; name .* --eod"):
        load_tokenizer(byte_level, "<eos>")


def test_what_is_lost_is_counted(words):
    tokenizer = load_tokenizer(words)
    trip = try_round_trip(tokenizer, ["the cat", "The cat", "the zebra"])
    assert (trip.documents, trip.changed) == (3, 2)
    assert tokenizer.encode_array("the zebra")[1] == tokenizer.unknown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a tokenizer.json: Expecting value"),
        (b"\xff", "not a tokenizer.json: 'utf-8' codec"),
        (b"[]", "not a tokenizer.json: it has no model"),
        (b"[" * 100_000, "not a tokenizer.json: "),
        (b'{"model": {"type": "Strange"}}', r"not a tokenizer.json that tokenizers \d.* reads: "),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(InputError, match=f"t.json: {message}"):
        load_tokenizer(tmp_path / "t.json")
    with pytest.raises(InputError, match="none.json: cannot read the tokenizer: No such file"):
        load_tokenizer(tmp_path / "none.json")


def test_a_file_without_a_usual_end(tmp_path, byte_level):
    values = json.loads(byte_level.read_text().replace("<|endoftext|>", "<|over|>"))
    (tmp_path / "t.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"has no token <\|endoftext\|> or .* or <eos> to end documents with"):
        load_tokenizer(tmp_path / "t.json")
    assert load_tokenizer(tmp_path / "t.json", "<|over|>").eod == 0


def test_the_package_is_not_there(byte_level, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="takes `tokenizers`: pip install tokenizers"):
        load_tokenizer(byte_level)


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_of_it(byte_level, tmp_path, documents, workers):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    options = PrepareOptions(
        (str(tmp_path / "a.jsonl"),), tmp_path / "o", tokenizer=byte_level, validation_fraction=0.2, eod="<|im_start|>"
    )
    report = prepare(options, workers=workers)
    assert is_prepared(options)
    assert report.round_trip is not None
    assert report.round_trip.changed == report.unknown == 0
    shard, tokenizer = Shard(tmp_path / "o-train"), load_tokenizer(byte_level, "<|im_start|>")
    first = shard.read(0, int(shard.document_lengths[0])).tolist()
    assert first[-1] == 1
    assert tokenizer.decode(first[:-1]) in documents
    facts = shard_facts(tmp_path / "o-validation")
    assert facts is not None
    assert (facts.vocab_size, facts.tokenizer) == (340, str(byte_level))
    assert not is_prepared(PrepareOptions(options.inputs, options.output, byte_level, validation_fraction=0.2))


def test_from_text_to_a_checked_recipe(byte_level, tmp_path, documents, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("\n".join(documents))
    Path("tokenizer.json").write_bytes(byte_level.read_bytes())
    assert (
        main(["prepare", "--input", "a.txt", "--output", "o", "--tokenizer", "tokenizer.json", "--workers", "1"]) == 0
    )
    assert "warning" not in capsys.readouterr().err
    Path("a.yaml").write_text(
        "name: a\nmodel: {num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, seq_length: 16, "
        "vocab_size: 340}\ntraining: {steps: 3, global_batch_size: 2, micro_batch_size: 2}\n"
        "data: {train: o, tokenizer: tokenizer.json}\n"
    )
    assert main(["doctor", "a.yaml"]) == 0
    assert main(["doctor", "a.yaml", "model.vocab_size=339"]) == 2
    assert "set model.vocab_size=340" in capsys.readouterr().err


def test_no_torch(byte_level):
    script = (
        "import sys; from megatron_sbn.data.tokenizer import load_tokenizer\n"
        f"load_tokenizer({str(byte_level)!r})\nassert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
