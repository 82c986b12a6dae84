"""`sbn keys` and docs/recipe.md: every key of the schema, what it may be, and what it means."""

from pathlib import Path

import pytest

from megatron_sbn.cli import main
from megatron_sbn.config.keys import keys, markdown

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"


def test_every_key_has_a_meaning() -> None:
    found = list(keys())
    assert [key.name for key in found if not key.meaning] == []
    names = [key.name for key in found]
    assert len(names) == len(set(names)) > 95
    assert {"name", "model.hidden_size", "linear.phases.*.step", "data.train.*.weight", "tracking.uri"} <= set(names)


@pytest.mark.parametrize(
    ("name", "values", "default"),
    [
        ("model.num_layers", "whole number >= 1", "(required)"),
        ("model.num_query_groups", "whole number >= 1 | null", "null"),
        ("model.bf16", "true | false", "true"),
        ("linear.sparsity", "N:M", "6:8"),
        ("linear.activation_bits", "8 | 4 | null", "8"),
        ("linear.backward", "exact | int8_dgrad | int8", "exact"),
        ("linear.phases", "list", "[]"),
        ("data.train", "path | list", "(required)"),
        ("data.validation", "path | list | null", "null"),
        ("optimizer.adam_beta1", "number >= 0, < 1", "0.9"),
        ("training.seed", "whole number >= 0", "1234"),
    ],
)
def test_what_a_key_may_be(name: str, values: str, default: str) -> None:
    (key,) = [key for key in keys() if key.name == name]
    assert (key.values, key.default) == (values, default)


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown() == PAGE.read_text(), "sbn keys --markdown >docs/recipe.md"


def test_words_choose_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "mask", "steps"]) == 0
    out = capsys.readouterr().out
    assert "linear.mask_interval" in out
    assert "model.hidden_size" not in out
    assert main(["keys", "wgmma"]) == 0
    assert "linear.forward_form" in capsys.readouterr().out
    assert main(["keys", "nonesuch"]) == 2
    assert "no recipe key has nonesuch; sbn keys lists all" in capsys.readouterr().err
    assert main(["keys", "--markdown", "mask"]) == 2
