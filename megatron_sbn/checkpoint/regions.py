"""Regions: rectangular parts of a logical tensor, in which checkpoints are written and read.

A rank's shard of a tensor (`LogicalShard`) is some row ranges and one column range of it; ZeRO keeps a range of the
flattened shard, which may begin and end within a row. Such a range is, for every row range, at most three regions:

    . . . # #      the end of a row
    # # # # #      whole rows
    # # . . .      the beginning of a row

Saved and wanted regions are both in coordinates of the logical tensor, so a reader needs nothing but overlaps.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_sbn.parallel.shard import LogicalShard


@dataclass(frozen=True)
class Region:
    """`sizes` elements from `offsets` on, along each dimension of the logical tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements inside."""
        count = 1
        for size in self.sizes:
            count *= size
        return count

    def overlap(self, other: "Region") -> "Region | None":
        """What both hold; None where that is nothing."""
        starts = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        ends = tuple(
            min(a + m, b + n) for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Region(starts, sizes) if min(sizes) > 0 else None

    def within(self, other: "Region") -> tuple[slice, ...]:
        """Where it lies in a tensor that holds just `other`, of which it is a part."""
        starts = [a - b for a, b in zip(self.offsets, other.offsets, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


def disjoint(regions: Sequence[Region]) -> bool:
    """Whether no two of these regions, none of them empty, have an element in common. Takes time n log n.

    Row by row, with the column ranges of the regions that are there: a new one must fit between its neighbours.
    """
    events = []
    for region in regions:
        columns = (region.offsets[1], region.offsets[1] + region.sizes[1]) if len(region.sizes) > 1 else (0, 1)
        events += [
            (region.offsets[0], 1, columns),
            (region.offsets[0] + region.sizes[0], 0, columns),
        ]  # ends come first
    there: list[tuple[int, int]] = []
    for _, begins, (low, high) in sorted(events):
        place = bisect.bisect_left(there, (low, high))
        if not begins:
            del there[place]
            continue
        before, after = there[max(0, place - 1) : place], there[place : place + 1]
        if (before and before[0][1] > low) or (after and after[0][0] < high):
            return False
        there.insert(place, (low, high))
    return True


@dataclass(frozen=True)
class FlatRange:
    """A region that, row by row, is `region.numel` consecutive elements of a flattened shard, from `start` on."""

    region: Region
    start: int


def flat_ranges(shard: LogicalShard, start: int, length: int) -> Iterator[FlatRange]:
    """The regions of `length` elements from `start` on of a rank's flattened shard, in the order of the elements."""
    if len(shard.shape) > 2:
        raise ValueError(f"a tensor of shape {shard.shape} has no rows and columns; checkpoints hold one or two")
    first_column, width = shard.columns or (0, shard.shape[1] if len(shard.shape) == 2 else 1)
    before = 0  # elements of the shard before this range of rows
    for first_row, count in _joined(shard.rows):
        low, high = max(start - before, 0), min(start + length - before, count * width)
        for row, column, rows, columns in _rectangles(low, high, width):
            region = Region((first_row + row, first_column + column), (rows, columns))
            if len(shard.shape) == 1:
                region = Region(region.offsets[:1], region.sizes[:1])
            yield FlatRange(region, before + row * width + column)
        before += count * width


def shard_ranges(shard: LogicalShard) -> Iterator[FlatRange]:
    """The regions of a rank's whole shard."""
    width = 1 if len(shard.shape) == 1 else (shard.columns or (0, shard.shape[1]))[1]
    return flat_ranges(shard, 0, width * sum(count for _, count in shard.rows))


def _joined(ranges: tuple[tuple[int, int], ...]) -> Iterator[tuple[int, int]]:
    """Ranges (start, length) with neighbours that follow each other made one."""
    first, length = ranges[0]
    for start, more in ranges[1:]:
        if start == first + length:
            length += more
        else:
            yield first, length
            first, length = start, more
    yield first, length


def _rectangles(low: int, high: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, column, rows, columns) of elements `low` to `high` of a matrix of `width` columns, in order."""
    while low < high:
        row, column = divmod(low, width)
        if column or high - low < width:
            rows, columns = 1, min(width - column, high - low)
        else:
            rows, columns = (high - low) // width, width
        yield row, column, rows, columns
        low += rows * columns
