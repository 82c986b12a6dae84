"""Ranks that find each other, and those that do not: who is missing is said, a request to stop ends the wait."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from time_limit import LIMIT_SECONDS

from megatron_sbn.errors import STOPPED, RankLostError, RecipeError
from megatron_sbn.parallel import rendezvous

ALONE = """
import sys
from megatron_sbn.errors import SbnError
from megatron_sbn.launch.stop_signals import StopSignals
from megatron_sbn.parallel import rendezvous
from megatron_sbn.training.stop_request import check_before_first_step
rendezvous.SAY_SECONDS = 0.5
try:
    with StopSignals() as signals:
        rendezvous.join("gloo", lambda: check_before_first_step(signals))
except SbnError as error:
    print(error)
    sys.exit(error.status)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Rank 0 of 2."""
    for name in ("SLURM_STEP_ID", "GLOO_SOCKET_IFNAME", "TORCHELASTIC_USE_AGENT_STORE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    address = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def start(rank: int, ranks: int, port: int, **more: str) -> "subprocess.Popen[str]":
    address = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-c", ALONE],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | address | more,
    )  # fmt: skip


def lines(process: "subprocess.Popen[str]") -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("sbn: "):
            yield line


def test_missing_ranks_are_named_again_and_again_and_a_signal_ends_the_wait() -> None:
    """Of four ranks on two nodes those of the second node do not come."""
    port = free_port()
    two = [start(rank, 4, port, LOCAL_WORLD_SIZE="2") for rank in (0, 1)]
    try:
        for process in two:
            said = lines(process)
            waits = [
                line for line in (next(said) for _ in range(9)) if "ranks 2 to 3 of 4, on node 1 of 2 nodes" in line
            ]
            assert len(waits) > 1
        began = time.monotonic()
        two[0].send_signal(signal.SIGTERM)
        assert two[0].wait(LIMIT_SECONDS) == STOPPED
        assert two[0].stdout is not None
        assert "SIGTERM: stopped before the first step, with nothing to save" in two[0].stdout.read()
        assert time.monotonic() - began < LIMIT_SECONDS
    finally:
        for process in two:
            process.kill()
            process.communicate()


def test_a_rank_waits_for_rank_0_and_all_begin_when_it_comes() -> None:
    port = free_port()
    late = start(1, 2, port)
    try:
        assert f"rank 1 waits for rank 0 at 127.0.0.1:{port}" in next(lines(late))
        first = start(0, 2, port)
        assert first.wait(LIMIT_SECONDS) == 0
        assert late.wait(LIMIT_SECONDS) == 0
        first.communicate()
    finally:
        late.kill()
        late.communicate()


def test_too_long_a_wait_is_an_error(rank: pytest.MonkeyPatch) -> None:
    rank.setattr(rendezvous, "TIMEOUT", rendezvous.TIMEOUT / 3600)
    with pytest.raises(RankLostError, match=r"waited \d s for rank 1 of 2; look at its log"):
        rendezvous.join("gloo", lambda: None)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MASTER_ADDR", "no-such-host.invalid", "MASTER_ADDR = no-such-host.invalid: .*; name the machine of rank 0"),
        ("GLOO_SOCKET_IFNAME", "ib0", "GLOO_SOCKET_IFNAME = ib0: no interface ib0 on .*, which has .*lo"),
        ("GLOO_SOCKET_IFNAME", "lo,ib7", "no interface ib7"),
    ],
)
def test_what_cannot_work_is_one_line(variable: str, value: str, message: str, rank: pytest.MonkeyPatch) -> None:
    rank.setenv(variable, value)
    with pytest.raises(RecipeError, match=message) as error:
        rendezvous.join("gloo", lambda: None)
    assert not error.value.on_every_rank  # other machines may be right


def test_a_port_in_use_is_one_line(rank: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", int(os.environ["MASTER_PORT"])))
        taken.listen()
        with pytest.raises(RecipeError, match=r"MASTER_PORT = \d+: in use on .*; set another"):
            rendezvous.join("gloo", lambda: None)


@pytest.mark.parametrize(
    ("text", "fits"), [("l", True), ("=lo", True), ("=l", False), ("^ib", True), ("ib,lo", False), ("", True)]
)
def test_nccl_takes_beginnings_of_names(text: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", text)
    if fits:
        rendezvous._check_interface("nccl")
    else:
        with pytest.raises(RecipeError, match="no interface"):
            rendezvous._check_interface("nccl")


def test_several_ranks_without_a_meeting_point_are_refused(rank: pytest.MonkeyPatch) -> None:
    rank.delenv("MASTER_ADDR")
    with pytest.raises(RecipeError, match="MASTER_ADDR is not set; start several ranks with torchrun"):
        rendezvous.join("gloo", lambda: None)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([3], "rank 3"), ([0, 1, 2, 7], "ranks 0 to 2, 7"), ([*range(0, 20, 2)], "ranks 0, 2, 4, 6, 8, 10 and 4 more")],
)
def test_ranges(numbers: list[int], words: str) -> None:
    assert rendezvous.ranges(numbers) == words
