"""Rows of text in aligned columns, under a header; sizes in words."""

from collections.abc import Sequence


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: header, rule, rows; all rows as long as the header."""
    every = (header, *rows)
    widths = [max(len(row[column]) for row in every) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in every]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def size_text(count: float) -> str:
    """Bytes as GiB, or MiB below one."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
