"""LogicalShard: pieces that make the whole, and initial values that depend on the seed and the name alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sbn.parallel.shard import (
    LogicalShard,
    column_shard,
    gated_shard,
    initial_normal,
    is_expert,
    row_shard,
    unsharded,
)

FULL = torch.arange(24 * 6).view(24, 6)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("cut", [row_shard, column_shard, gated_shard])
def test_pieces_cover_the_whole_once(cut: object, size: int) -> None:
    again, times = torch.full_like(FULL, -1), torch.zeros_like(FULL)
    for rank in range(size):
        shard = cut(tuple(FULL.shape), rank, size)
        piece = shard.take(FULL)
        assert piece.numel() * size == shard.numel == FULL.numel()
        shard.put(again, piece)
        once = torch.zeros_like(FULL)
        shard.put(once, torch.ones_like(piece))
        times += once
    assert torch.equal(again, FULL)
    assert (times == 1).all()


def test_where_pieces_lie() -> None:
    assert torch.equal(row_shard((24, 6), 1, 3).take(FULL), FULL[8:16])
    assert torch.equal(column_shard((24, 6), 1, 3).take(FULL), FULL[:, 2:4])
    # gate rows are the first half, up rows the second: a rank stores [gate_r; up_r].
    assert torch.equal(gated_shard((24, 6), 1, 3).take(FULL), torch.cat([FULL[4:8], FULL[16:20]]))
    assert torch.equal(row_shard((24,), 1, 3).take(FULL[:, 0]), FULL[8:16, 0])
    assert torch.equal(unsharded((24, 6)).take(FULL), FULL)


@given(
    ranges=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 4)), min_size=1, max_size=4),
    columns=st.none() | st.tuples(st.integers(0, 3), st.integers(1, 3)),
)
def test_put_is_the_inverse_of_take(ranges: list[tuple[int, int]], columns: tuple[int, int] | None) -> None:
    shard = LogicalShard((24, 6), tuple(ranges), columns)
    target = torch.full_like(FULL, -1)
    shard.put(target, shard.take(FULL))
    written = target >= 0
    assert torch.equal(target[written], FULL[written])
    assert torch.equal(shard.take(target), shard.take(FULL))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_how_many_ranks_hold_the_tensor(size: int) -> None:
    for cut in (row_shard, column_shard, gated_shard):
        assert cut((24, 6), size - 1, size).shares == size
    assert row_shard((24,), 0, size).shares == size
    assert unsharded((24, 6)).shares == unsharded((24,)).shares == 1


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight", True),
        ("telemetry.masks.decoder.layers.0.mlp.experts.local_experts.3.linear_fc2", True),
        ("decoder.layers.0.mlp.router.weight", False),
        ("decoder.layers.0.mlp.linear_fc1.weight", False),
    ],
)
def test_names_of_experts(name: str, expert: bool) -> None:
    assert is_expert(name) == expert


def test_initial_values() -> None:
    value = initial_normal("layer.weight", (400, 300), 0.02, 1234)
    assert torch.equal(value, initial_normal("layer.weight", (400, 300), 0.02, 1234))
    assert value.dtype == torch.float32
    assert abs(float(value.mean())) < 5 * 0.02 / 400
    assert float(value.std()) == pytest.approx(0.02, rel=0.01)
    for name, seed in (("layer.weigh", 1234), ("layer.weight", 1235), ("4:layer.weight", 123)):
        assert not torch.equal(value, initial_normal(name, (400, 300), 0.02, seed))


def test_initial_values_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    initial_normal("a", (3, 3), 1.0, 0)
    assert torch.equal(torch.get_rng_state(), before)
