"""What is shown: no secrets, one line, not too much of it."""

import io

import pytest

from megatron_sbn.errors import RecipeError
from megatron_sbn.redaction import LONGEST, excerpt, mask_secrets, one_line, show_anything


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("http://user:pass@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg2://u:p%40ss@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("https://u:p@ss@host", "https://***@host"),
        ("failed: http://a:b@h/api and http://c:d@h/", "failed: http://***@h/api and http://***@h/"),
        ("http://host/?token=abc&x=1", "http://host/?token=***&x=1"),
        ("train --api-token=abc optimizer.lr=3", "train --api-token=*** optimizer.lr=3"),
        ("MLFLOW_TRACKING_PASSWORD=abc train", "MLFLOW_TRACKING_PASSWORD=*** train"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
        ("sqlite:///a@b.db", "sqlite:///a@b.db"),
        ("/work/http:/u:p@host/x.yaml: no such file", "/work/http:/***@host/x.yaml: no such file"),
        ("http://host:5000 mail me@host", "http://host:5000 mail me@host"),
        ("data.tokenizer=runs/t.model max_tokens=5", "data.tokenizer=runs/t.model max_tokens=5"),
    ],
)
def test_mask_secrets(text, masked):
    assert mask_secrets(text) == masked
    assert mask_secrets(masked) == masked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a recipe: 6:8, 'x'", "a recipe: 6:8, 'x'"),
        ("a\nsbn: b\r\tc\0", r"a\nsbn: b\r\tc\x00"),
        ("\x1b[2J\x85\u202e\ud800", r"\x1b[2J\x85\u202e\ud800"),
        ("caf\u00e9", "caf\u00e9"),
        ("tracking.uri=http://me:hush@host\n", r"tracking.uri=http://***@host\n"),
    ],
    ids=ascii,
)
def test_one_line(text: str, shown: str) -> None:
    assert one_line(text) == shown
    assert str(RecipeError(text)) == shown


def test_of_a_long_text_the_beginning_and_the_end_are_shown() -> None:
    shown = one_line(f"recipe.yaml: {'x' * 10**6}; name another")
    assert len(shown) <= LONGEST
    assert shown.startswith("recipe.yaml: xxx")
    assert shown.endswith("xxx; name another")


def test_an_excerpt_is_cut_after_its_secrets_are_gone() -> None:
    assert excerpt({"uri": "http://someone:a-long-password@host:5000/"}, 30) == "{'uri': 'http://***@host:50..."
    assert excerpt(5) == "5"


def test_what_stdout_cannot_encode_is_written_as_python_would(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(content, encoding="ascii"))
    show_anything()
    print("wrote \udcff/caf\u00e9", flush=True)
    assert content.getvalue() == b"wrote \\udcff/caf\\xe9\n"
