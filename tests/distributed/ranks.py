"""Runs one function on several gloo ranks of this machine and gives back what each returned.

    losses = run_ranks(train, 4, recipe)        # train(recipe) on ranks 0..3, list of four results

Importing the engines takes ten seconds a process, so ranks are forked from one server process that has imported them
(and has no threads); each call gets fresh ranks, and nothing that one job leaves behind reaches the next. A rank that
raises fails the call with that rank's traceback; one that hangs fails it with the phase and the stack it hangs in.
"""

import datetime
import faulthandler
import functools
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

from time_limit import LIMIT_SECONDS

IMPORTED_ONCE = ["pytest", "megatron_sbn.training.step", "megatron_sbn.training.checkpoint_manager"]
# Ranks are CPU ranks on every machine, one thread each.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
GRACE_SECONDS = 3.0  # for the tracebacks of ranks that fail because another one did
STACK_SECONDS = 10.0  # for the stack of a rank that hangs


class RankError(AssertionError):
    """A rank raised, died or hung."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: object, timeout: float = LIMIT_SECONDS
) -> list[Any]:
    """`function(*args)` on every rank, inside an initialized process group; results in the order of ranks.

    `function` is at module level; arguments and results are pickled. Raises RankError when a rank raises, or when no
    rank has come to another phase, or to its end, for `timeout` seconds.
    """
    job = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_start(rank, world_size, job, Path(folder), timeout) for rank in range(world_size)]
        try:
            return _collect(function.__name__, ranks, Path(folder), timeout)
        finally:
            for process, connection in ranks:
                process.kill()
                process.join()
                connection.close()


Rank = tuple[multiprocessing.process.BaseProcess, Connection]


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


def _start(rank: int, world_size: int, job: bytes, folder: Path, timeout: float) -> Rank:
    ours, theirs = _server().Pipe(duplex=False)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        process = _server().Process(target=_rank_main, args=(rank, world_size, job, folder, timeout, theirs))
        process.daemon = True
        process.start()
    theirs.close()
    return process, ours


def _collect(name: str, ranks: list[Rank], folder: Path, timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    phases = ["starting"] * len(ranks)
    while len(results) + len(failures) < len(ranks):
        waiting = {c: rank for rank, (_, c) in enumerate(ranks) if rank not in results and rank not in failures}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting[connection]
            kind, value = _receive(ranks[rank])
            if kind == "phase":
                phases[rank] = str(value)
                if not failures:
                    deadline = time.monotonic() + timeout
            elif kind == "done":
                results[rank] = value
            else:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                failures[rank] = str(value)
    if failures:
        report = "\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items()))
        raise RankError(f"{name} failed on rank {', '.join(map(str, sorted(failures)))}\n{report}")
    hung = [rank for rank in range(len(ranks)) if rank not in results]
    if hung:
        report = "\n".join(
            f"rank {rank} hung while {phases[rank]}:\n{_stack(ranks[rank], folder, rank)}" for rank in hung
        )
        raise RankError(f"{name} came no further within {timeout} s\n{report}")
    return [results[rank] for rank in range(len(ranks))]


def _receive(rank: Rank) -> tuple[str, Any]:
    process, connection = rank
    try:
        kind, value = pickle.loads(connection.recv_bytes())
    except EOFError:
        process.join()
        return "failed", f"the process died with status {process.exitcode}"
    return kind, value


def _stack(rank: Rank, folder: Path, number: int) -> str:
    process, _ = rank
    if process.pid is None or not process.is_alive():
        return "the process is gone"
    os.kill(process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + STACK_SECONDS
    while not (text := (folder / f"stack-{number}").read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return text


class _Report:
    """What a rank tells the test: phases, then its result or its traceback."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def tell(self, kind: str, value: object) -> None:
        self._connection.send_bytes(pickle.dumps((kind, value)))

    def __enter__(self) -> "_Report":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if error is not None:
            self.tell("failed", "".join(traceback.format_exception(error)))
        return True


def _rank_main(rank: int, world_size: int, job: bytes, folder: Path, timeout: float, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    with (folder / f"stack-{rank}").open("w") as stack, _Report(connection) as report:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        report.tell("phase", "joining the process group")
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=2 * timeout + 60),  # the hang is reported first, with its stack
        )
        report.tell("phase", "running")
        function, args = pickle.loads(job)
        result = function(*args)
        report.tell("phase", "waiting for the other ranks to finish")
        dist.barrier()
        report.tell("done", result)
