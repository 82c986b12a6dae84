"""Text for people: rows in aligned columns under a header; sizes, counts and durations in words."""

from collections.abc import Callable, Sequence

_SI = ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"), (1, ""))


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: header, rule, rows, all flush left."""
    lines = _in_columns([header, *rows], [str.ljust] * len(header))
    return [lines[0], "  ".join("-" * width for width in _widths([header, *rows])), *lines[1:]]


def numeric(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table without a rule: the first column flush left, the others (numbers) flush right."""
    return _in_columns([header, *rows], [str.ljust, *[str.rjust] * (len(header) - 1)])


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Of every column; all rows have as many cells as the first."""
    return [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]


def _in_columns(rows: Sequence[Sequence[str]], flush: Sequence[Callable[[str, int], str]]) -> list[str]:
    cells = [[f(cell, w) for f, cell, w in zip(flush, row, _widths(rows), strict=True)] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]


def size_text(count: float) -> str:
    """Bytes as GiB, or MiB below one."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def prefixed(value: float) -> str:
    """With the SI prefix that leaves at least one digit before the point: 1.50 M."""
    unit, letter = next((pair for pair in _SI if value >= pair[0]), _SI[-1])
    return f"{value / unit:,.2f} {letter}"


def count_text(number: int) -> str:
    """A count in at most seven characters: 3.21M, 12.00k, 9,120."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= 10 * size or number >= size > 10**3:
            return f"{number / size:.2f}{letter}"
    return f"{number:,}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    return f"{int(seconds // 3600)}:{int(seconds // 60) % 60:02d}:{int(seconds) % 60:02d}"
