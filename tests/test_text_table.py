"""Tables, sizes, counts and durations as people read them."""

import pytest

from megatron_sbn.text_table import aligned, clock, count_text, numeric, prefixed, size_text


def test_words_are_flush_left_under_a_rule() -> None:
    assert aligned(("name", "x"), [("a", "1"), ("longer", "22")]) == [
        "name    x",
        "------  --",
        "a       1",
        "longer  22",
    ]


def test_numbers_are_flush_right() -> None:
    assert numeric(("name", "x"), [("a", "1"), ("longer", "22")]) == ["name     x", "a        1", "longer  22"]


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (prefixed(0.5), "0.50 "),
        (prefixed(999), "999.00 "),
        (prefixed(1.5e6), "1.50 M"),
        (prefixed(2e18), "2,000.00 P"),
        (count_text(9120), "9,120"),
        (count_text(12000), "12.00k"),
        (count_text(3_210_000), "3.21M"),
        (size_text(2**20), "1.00 MiB"),
        (size_text(3 * 2**30), "3.00 GiB"),
        (clock(3723.9), "1:02:03"),
    ],
)
def test_figures(made: str, text: str) -> None:
    assert made == text
