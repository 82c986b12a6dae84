"""Regions of flat fragments: the right elements, in order, each once, however a shard is divided."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sbn.checkpoint.regions import Region, disjoint, flat_ranges, shard_ranges
from megatron_sbn.parallel.shard import LogicalShard, column_shard, gated_shard, row_shard, unsharded


@st.composite
def shards(draw: st.DrawFn) -> LogicalShard:
    """Shards as layers have them, at odd sizes: rows, columns, gate and up, QKV's rows of a rank's query groups."""
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
    return gated_shard((2 * rows, columns), rank, size) if kind == "gated" else unsharded((rows, columns))


REGIONS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 3), st.integers(1, 3)), max_size=6
).map(lambda drawn: [Region((row, column), (rows, columns)) for row, column, rows, columns in drawn])


@given(regions=REGIONS)
@settings(max_examples=300, deadline=None)
def test_regions_are_disjoint_where_no_two_of_them_overlap(regions: list[Region]) -> None:
    assert disjoint(regions) == (not any(a.overlap(b) for a, b in itertools.combinations(regions, 2)))
    flat = [Region(region.offsets[:1], region.sizes[:1]) for region in regions]
    assert disjoint(flat) == (not any(a.overlap(b) for a, b in itertools.combinations(flat, 2)))


def test_very_many_regions_are_looked_at_in_a_moment() -> None:
    regions = [Region((row, 100 * column), (1, 100)) for row in range(1000) for column in range(100)]
    assert disjoint(regions)
    assert not disjoint([*regions, Region((500, 50), (1, 1))])


@given(shard=shards(), cuts=st.lists(st.integers(0, 1000), max_size=6))
@settings(max_examples=300, deadline=None)
def test_fragments_cover_a_shard_once_and_in_order(shard: LogicalShard, cuts: list[int]) -> None:
    """ZeRO's fragments end anywhere; put together region by region they are what `put` makes of the shard."""
    local = shard.take(torch.arange(1, shard.numel + 1).view(shard.shape))
    flat = local.reshape(-1)
    ends = sorted({0, flat.numel(), *(cut % (flat.numel() + 1) for cut in cuts)})
    made, expected = torch.zeros(shard.shape, dtype=torch.int64), torch.zeros(shard.shape, dtype=torch.int64)
    shard.put(expected, local)
    for start, end in itertools.pairwise(ends):
        found = list(flat_ranges(shard, start, end - start))
        assert len(found) <= 3 * len(shard.rows)
        assert [run.start for run in found] == list(itertools.accumulate([start, *(r.region.numel for r in found)]))[
            :-1
        ]
        for run in found:
            values = flat[run.start : run.start + run.region.numel].view(run.region.sizes)
            place = run.region.within(Region((0,) * len(shard.shape), shard.shape))
            assert not made[place].any()
            made[place] = values
    assert torch.equal(made, expected)


@given(shard=shards())
def test_a_piece_is_one_box_for_every_gap_in_its_rows(shard: LogicalShard) -> None:
    gaps = sum(a[0] + a[1] != b[0] for a, b in itertools.pairwise(shard.rows))
    assert len(list(shard_ranges(shard))) == 1 + gaps


regions = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(1, 4), st.integers(1, 4)).map(
    lambda t: Region(t[:2], t[2:])
)


@given(a=regions, b=regions)
def test_overlaps(a: Region, b: Region) -> None:
    everything = Region((0, 0), (12, 12))
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
        list(flat_ranges(LogicalShard((2, 2, 2), ((0, 2),)), 0, 8))
