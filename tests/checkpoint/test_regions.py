"""Boxes of flat fragments: they hold the elements that they should, in order, each once, however a piece is cut."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sbn.checkpoint.regions import Box, apart, piece, runs
from megatron_sbn.parallel.shard import LogicalShard, column_shard, gated_shard, row_shard, whole


@st.composite
def shards(draw: st.DrawFn) -> LogicalShard:
    """Pieces as layers have them, at odd sizes: rows, columns, gate and up, QKV's rows of a rank's query groups."""
    size, rank = draw(st.sampled_from([(1, 0), (2, 0), (2, 1), (3, 1), (3, 2)]))
    rows, columns = draw(st.integers(1, 5)) * size, draw(st.integers(1, 7)) * size
    kind = draw(st.sampled_from(["rows", "columns", "gated", "whole", "vector", "scattered"]))
    if kind == "vector":
        return row_shard((rows,), rank, size)
    if kind == "scattered":
        return LogicalShard((3 * rows, columns), ((0, rows), (2 * rows, rows)), (0, columns))
    make = {"rows": row_shard, "columns": column_shard}.get(kind)
    if make is not None:
        return make((rows, columns), rank, size)
    return gated_shard((2 * rows, columns), rank, size) if kind == "gated" else whole((rows, columns))


BOXES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 3), st.integers(1, 3)), max_size=6).map(
    lambda drawn: [Box((row, column), (rows, columns)) for row, column, rows, columns in drawn]
)


@given(boxes=BOXES)
@settings(max_examples=300, deadline=None)
def test_boxes_are_apart_where_no_two_of_them_overlap(boxes: list[Box]) -> None:
    assert apart(boxes) == (not any(a.overlap(b) for a, b in itertools.combinations(boxes, 2)))
    flat = [Box(box.offsets[:1], box.sizes[:1]) for box in boxes]
    assert apart(flat) == (not any(a.overlap(b) for a, b in itertools.combinations(flat, 2)))


def test_very_many_boxes_are_looked_at_in_a_moment() -> None:
    boxes = [Box((row, 100 * column), (1, 100)) for row in range(1000) for column in range(100)]
    assert apart(boxes)
    assert not apart([*boxes, Box((500, 50), (1, 1))])


@given(shard=shards(), cuts=st.lists(st.integers(0, 1000), max_size=6))
@settings(max_examples=300, deadline=None)
def test_fragments_cover_a_piece_once_and_in_order(shard: LogicalShard, cuts: list[int]) -> None:
    """ZeRO's fragments end anywhere; put into the logical tensor box by box they are what `put` makes of the piece."""
    local = shard.take(torch.arange(1, shard.numel + 1).view(shard.shape))
    flat = local.reshape(-1)
    ends = sorted({0, flat.numel(), *(cut % (flat.numel() + 1) for cut in cuts)})
    made, expected = torch.zeros(shard.shape, dtype=torch.int64), torch.zeros(shard.shape, dtype=torch.int64)
    shard.put(expected, local)
    for start, end in itertools.pairwise(ends):
        found = list(runs(shard, start, end - start))
        assert len(found) <= 3 * len(shard.rows)
        assert [run.start for run in found] == list(itertools.accumulate([start, *(r.box.numel for r in found)]))[:-1]
        for run in found:
            values = flat[run.start : run.start + run.box.numel].view(run.box.sizes)
            place = run.box.within(Box((0,) * len(shard.shape), shard.shape))
            assert not made[place].any()
            made[place] = values
    assert torch.equal(made, expected)


@given(shard=shards())
def test_a_piece_is_one_box_for_every_gap_in_its_rows(shard: LogicalShard) -> None:
    gaps = sum(a[0] + a[1] != b[0] for a, b in itertools.pairwise(shard.rows))
    assert len(list(piece(shard))) == 1 + gaps


boxes = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(1, 4), st.integers(1, 4)).map(
    lambda t: Box(t[:2], t[2:])
)


@given(a=boxes, b=boxes)
def test_overlaps(a: Box, b: Box) -> None:
    everything = Box((0, 0), (12, 12))
    marks = torch.zeros(2, 12, 12, dtype=torch.bool)
    marks[0][a.within(everything)] = True
    marks[1][b.within(everything)] = True
    both, common = marks.all(0), a.overlap(b)
    assert (common is None) == (not both.any())
    if common is not None:
        assert common == b.overlap(a)
        assert common.numel == int(both.sum())
        assert bool(both[common.within(everything)].all())


def test_tensors_of_more_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="one or two"):
        list(runs(LogicalShard((2, 2, 2), ((0, 2),)), 0, 8))
