"""run_ranks itself: results in order, a failing rank's own traceback, a hanging rank's stack."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks


def total_of_ranks(offset: int) -> tuple[int, int, int]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return int(total), dist.get_rank(), torch.get_num_threads()


def leave_something_behind() -> str | None:
    left, os.environ["LEFT_BEHIND"] = os.environ.get("LEFT_BEHIND"), "yes"
    return left


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no such luck")
    dist.barrier()


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        sleep_forever()
    dist.barrier()


def sleep_forever() -> None:
    time.sleep(3600)


def die_on_rank_0() -> None:
    if dist.get_rank() == 0:
        os._exit(7)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_the_order_of_ranks(world_size: int) -> None:
    total = sum(range(world_size)) + 10 * world_size
    assert run_ranks(total_of_ranks, world_size, 10) == [(total, rank, 1) for rank in range(world_size)]


def test_nothing_reaches_the_next_job() -> None:
    assert run_ranks(leave_something_behind, 1) == [None]
    assert run_ranks(leave_something_behind, 1) == [None]


def test_a_failure_shows_the_ranks_own_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)fail_on_rank_1 failed on rank.*1.*ValueError: no such luck"):
        run_ranks(fail_on_rank_1, 2)


def test_a_hang_names_rank_phase_and_line() -> None:
    with pytest.raises(RankError, match=r"(?s)within 5 s.*rank 1 hung while running.*in sleep_forever"):
        run_ranks(hang_on_rank_1, 2, timeout=5)


def test_a_death_is_reported() -> None:
    with pytest.raises(RankError, match="rank 0: the process died with status 7"):
        run_ranks(die_on_rank_0, 2)
