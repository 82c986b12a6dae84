"""The grid of ranks: [pipeline, data, tensor], slowest first, and the groups along its axes."""

import numpy as np
import pytest
import torch.distributed as dist
from ranks import run_ranks
from training_runs import small_recipe

from megatron_sbn.parallel import state as parallel_state
from megatron_sbn.parallel.cuda_shim import without_cuda


def place_and_groups(overrides: tuple[str, ...]) -> tuple[tuple[int, ...], dict[str, list[int]], bool, str]:
    with without_cuda():
        state = parallel_state.initialize(small_recipe(overrides))
        groups = {
            "tensor": state.tensor.group,
            "pipeline": state.pipeline.group,
            "data": state.data.group,
            "model": state.model_group,
        }
        members = {name: sorted(dist.get_process_group_ranks(group)) for name, group in groups.items()}
        place = (state.pipeline.rank, state.data.rank, state.tensor.rank)
        description = (place, members, state.is_last_stage, state.describe())
        parallel_state.finalize()
    return description


@pytest.mark.parametrize(
    ("pipeline", "data", "tensor"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1)], ids=str
)
def test_ranks_stand_on_the_grid(pipeline: int, data: int, tensor: int) -> None:
    grid = np.arange(pipeline * data * tensor).reshape(pipeline, data, tensor)
    overrides = (f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", "parallel.sequence=true")
    ranks = run_ranks(place_and_groups, grid.size, overrides)
    for rank, (place, members, last, description) in enumerate(ranks):
        p, d, t = (int(axis[0]) for axis in np.where(grid == rank))
        assert place == (p, d, t)
        assert members == {
            "tensor": grid[p, d].tolist(),
            "pipeline": grid[:, d, t].tolist(),
            "data": grid[p, :, t].tolist(),
            "model": sorted(grid[:, d].flatten().tolist()),
        }
        assert last == (p == pipeline - 1)
        sequence = ", sequence-parallel" if tensor > 1 else ""
        plural = "s" if grid.size > 1 else ""
        assert (
            description
            == f"tensor {tensor}{sequence} x pipeline {pipeline} x data {data} on {grid.size} cpu rank{plural}"
        )


def two_layouts_in_one_process() -> list[int]:
    sizes = []
    for overrides in (("parallel.tensor=2",), ("parallel.pipeline=2",)):
        with without_cuda():
            state = parallel_state.initialize(small_recipe(overrides))
            sizes += [state.tensor.size, state.pipeline.size]
            parallel_state.finalize()
    return sizes


def test_a_layout_can_follow_another_in_one_process() -> None:
    assert run_ranks(two_layouts_in_one_process, 2) == [[2, 1, 1, 2]] * 2
