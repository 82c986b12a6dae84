"""The tokenizer loses nothing, is a function of its input, and tells what is wrong with a model or a size."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_sbn.data import tokenizer as tokenizer_module
from megatron_sbn.data.tokenizer import Tokenizer, load_tokenizer, train_model, train_tokenizer
from megatron_sbn.errors import InputError

AWKWARD = [
    "\x00",
    "\r\n",
    "\t",
    "\u2581",
    "\u2585",
    "  ",
    "\n\n",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "\ufeff",
    "\u00a0",
    "e\u0301",
]
any_text = st.lists(st.one_of(st.text(), st.sampled_from(AWKWARD))).map("".join)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=any_text)
def test_round_trip_is_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(2 < token < tokenizer.vocab_size for token in ids)  # never unk, bos or eos
    assert tokenizer.encode_array(text).tolist() == ids


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=any_text, segment=st.integers(1, 9))
def test_round_trip_over_segments(tokenizer, text, segment):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_SEGMENT", segment)
        assert tokenizer.decode(tokenizer.encode(text)) == text


WORDS = "the model learns from text and more words again".split()
JAPANESE = "".join(chr(0x3042 + 7 * i % 80) + chr(0x4E00 + 11 * i % 60) for i in range(4000))
TRAINED_ON = {
    "no space": ["\t".join(WORDS[i % 9] for i in range(k, k + 40)) for k in range(50)],
    "Japanese": [JAPANESE],
    "a space in ten thousand": [JAPANESE[:7000] + " " + JAPANESE],
    "control pieces": ["<s> </s> <unk> <0x41> <0x20> <0xE2> \u2585 \u2047" * 20] * 20,
    "spaces alone": [" " * 400, "\n \n  \n" * 90],
    "marks alone": ["a\u2581b" * 90],
}


@pytest.fixture(scope="module", params=TRAINED_ON)
def odd_tokenizer(request, tmp_path_factory):
    texts = TRAINED_ON[request.param]
    sizes = {"no space": 300, "spaces alone": 263, "control pieces": 263, "marks alone": 262}
    path = tmp_path_factory.mktemp("odd") / "odd.model"
    return train_tokenizer(texts, path, sizes.get(request.param, 420))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.one_of(st.text(), st.sampled_from([*AWKWARD, " ", "the model", "a b"]))).map("".join))
def test_round_trip_is_exact_whatever_it_was_trained_on(odd_tokenizer, text):
    ids = odd_tokenizer.encode(text)
    assert odd_tokenizer.decode(ids) == text
    assert all(2 < token < odd_tokenizer.vocab_size for token in ids)


def test_a_space_is_not_its_mark(odd_tokenizer):
    assert odd_tokenizer.encode(" ") != odd_tokenizer.encode("\u2581")
    assert odd_tokenizer.encode("a b") != odd_tokenizer.encode("a\u2581b")
    assert [odd_tokenizer.decode(odd_tokenizer.encode(text)) for text in (" ", "\u2581")] == [" ", "\u2581"]


def test_segments_end_with_lines(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_SEGMENT", 5)
    assert list(tokenizer_module._segments("ab\ncd\nefghijkl\n\n")) == ["ab\n", "cd\n", "efghi", "jkl\n\n"]


def test_long_text_without_spaces(tokenizer):
    text = "x" * 2_500_000
    assert tokenizer.decode(tokenizer.encode_array(text)) == text


def test_digits_and_pieces(tokenizer):
    assert len(tokenizer.encode("2026")) == 4
    assert len(tokenizer.encode("return width")) < len("return width") / 2
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_eod_is_no_text(tokenizer):
    assert tokenizer.eod == 2
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eod, *tokenizer.encode(" b")]) == "a b"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/dev/zero", "/dev/zero: is no file; name a tokenizer model"),
        ("a\0b", r"a\\x00b: cannot read the tokenizer model: embedded null byte"),
        ("x" * 5000, "cannot read the tokenizer model: File name too long"),
    ],
    ids=lambda text: text[:5],
)
def test_paths_that_are_no_model(path, expected):
    with pytest.raises(InputError, match=expected):
        Tokenizer(path)


def test_a_piece_that_is_no_text_is_refused(tokenizer, tmp_path):
    piece = b"<0x41>"
    content = tokenizer.path.read_bytes()
    assert piece in content
    (tmp_path / "bad.model").write_bytes(content.replace(b"the", b"t\xb6e").replace(piece, b"<0x\xf8>", 1))
    with pytest.raises(InputError, match="not a sentencepiece model"):
        Tokenizer(tmp_path / "bad.model")


@pytest.mark.parametrize("token", [-1, 340])
def test_decode_refuses_foreign_ids(tokenizer, token):
    with pytest.raises(ValueError, match=f"token id {token} is outside the vocabulary of 340"):
        tokenizer.decode([5, token])


def test_training_is_deterministic_and_exact_in_size(tokenizer, documents):
    model = train_model(iter(documents), 340)
    assert model == tokenizer.path.read_bytes()
    assert model != train_model(iter(documents[:40]), 340)
    assert tokenizer.vocab_size == 340


def test_trains_on_what_sentencepiece_dislikes(tmp_path):
    words = "".join(chr(0x4E00 + i) for i in range(30)) * 5000  # one word of 150,000 characters
    trained = train_tokenizer(["\0\u2581\u2585\t", words, "b" * 70_000, "a b c\r\n" * 100], tmp_path / "t.model", 320)
    assert trained.decode(trained.encode("\0\u2581\u2585\t" + words)) == "\0\u2581\u2585\t" + words


def test_sample_is_bounded_uniform_and_ordered():
    documents = [f"{number:05d}" for number in range(10_000)]
    sample = tokenizer_module._sample(iter(documents), 5_000, seed=3)
    assert len(sample) == 1_000
    assert sample == sorted(sample)
    assert sample == tokenizer_module._sample(iter(documents), 5_000, seed=3)
    assert sample != tokenizer_module._sample(iter(documents), 5_000, seed=4)
    assert abs(np.mean([int(number) for number in sample]) - 5_000) < 4 * 10_000 / np.sqrt(12 * 1_000)
    assert tokenizer_module._sample(iter(documents), 50_000, seed=3) == documents
    assert [len(text) for text in tokenizer_module._sample(["a" * 100], 30, seed=0)] == [30]


def test_too_large_a_vocabulary_names_the_limit_that_works(tmp_path, documents):
    documents = documents[:5]
    with pytest.raises(InputError, match=r"vocab_size 9000 is too large for this corpus: at most (\d+)") as failure:
        train_tokenizer(documents, tmp_path / "t.model", 9000)
    assert list(tmp_path.iterdir()) == []
    limit = int(str(failure.value).split("at most ")[1].split(",")[0])
    assert Tokenizer(train_tokenizer(documents, tmp_path / "t.model", limit).path).vocab_size == limit
    with pytest.raises(InputError, match=f"at most {limit},"):
        train_model(documents, limit + 1)


def test_too_small_a_vocabulary_names_the_limit_that_works(documents):
    documents = documents[:5]
    with pytest.raises(InputError, match=r"vocab_size 100 is too small .*: at least (\d+)") as failure:
        train_model(documents, 100)
    least = int(str(failure.value).rsplit(" ", 1)[1])
    assert train_model(documents, least)
    with pytest.raises(InputError, match="too small"):
        train_model(documents, least - 1)


@pytest.mark.parametrize("documents", [[], [""], ["\0"]])
def test_nothing_to_train_on(documents):
    with pytest.raises(InputError, match="empty corpus"):
        train_model(documents, 300)


def test_bad_model_files(tmp_path):
    with pytest.raises(InputError, match=r"none.model: cannot read the tokenizer model: No such file"):
        Tokenizer(tmp_path / "none.model")
    for content in (b"", b"no model at all"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(InputError, match=r"bad.model: not a sentencepiece model"):
            Tokenizer(tmp_path / "bad.model")


def test_cut_model_file(tokenizer, tmp_path):
    (tmp_path / "cut.model").write_bytes(tokenizer.path.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"cut.model: not a sentencepiece model"):
        Tokenizer(tmp_path / "cut.model")


def _foreign(path: Path, documents: list[str], **options: object) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents),
        model_prefix=str(path.with_suffix("")),
        vocab_size=330,
        minloglevel=3,
        **options,
    )
    return path


def test_model_without_eos(tmp_path, documents):
    path = _foreign(tmp_path / "noeos.model", documents, model_type="bpe", byte_fallback=True, eos_id=-1)
    with pytest.raises(InputError, match=r"noeos.model: the tokenizer has no end-of-sentence piece"):
        Tokenizer(path)


def test_another_piece_may_end_documents(tmp_path, documents, tokenizer):
    path = _foreign(tmp_path / "noeos.model", documents, model_type="bpe", byte_fallback=True, eos_id=-1)
    assert Tokenizer(path, "<s>").eod == 1
    assert load_tokenizer(tokenizer.path, "<s>").eod == 1
    with pytest.raises(InputError, match=r"noeos.model: has no piece <eos> to end documents with; .* --eod"):
        Tokenizer(path, "<eos>")


def test_foreign_model_is_used_as_it_is(tmp_path, documents):
    path = _foreign(tmp_path / "foreign.model", documents, model_type="bpe", byte_fallback=True)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    text = "the  cat\u2581sat \u2581 on"
    assert Tokenizer(path).encode(text) == reference.encode(text)


def test_nothing_is_printed(tmp_path, capfd, documents):
    with pytest.raises(InputError):
        train_tokenizer(["a b"], tmp_path / "t.model", 5000)
    trained = train_tokenizer(documents[:9], tmp_path / "t.model", 320)
    trained.encode("a\0b")
    assert capfd.readouterr() == ("", "")
