"""One attempt at a training run under fire: real ranks are started, killed as planned, and waited for.

Importing the engines takes ten seconds a process, so ranks are forked from one server process that has imported them;
each has the environment that torchrun would give it, and enters by `megatron_sbn.train.main`. When one is killed the
others are ended too, as by torchrun: at once, or asked first and given a moment, in which they may do what they like.
"""

import faulthandler
import functools
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from unittest import mock

from watch import Ambush, Marks, Phase, Stage, Watch, make_marks, read_marks

IMPORTED_ONCE = ["pytest", "megatron_sbn.train", "megatron_sbn.training.loop"]
# PYTHONWARNINGS: what the engines miss when they are imported, which says nothing here.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "PYTHONWARNINGS": "ignore",
}
PORTS = range(20000, 30000)  # below those that the kernel gives to outgoing connections
LIMIT_SECONDS = 600.0  # to tell a hang from a busy machine
GRACE_SECONDS = 2.0  # for ranks that are asked to end


class FireError(AssertionError):
    """A rank failed by itself, or hung."""


@dataclass(frozen=True)
class Shot:
    """When to kill whom: `seconds` after the start, or after an ambush of rank `watched` has been reached.

    `victims` are killed together, then the rest ends: asked first if `gentle`.
    """

    victims: tuple[int, ...]
    seconds: float
    ambush: Ambush | None = None
    watched: int = 0
    gentle: bool = False


@dataclass(frozen=True)
class Outcome:
    """What an attempt came to: `moment` is "" for one that ended by itself.

    `first` is the step that it began with (None: it came to none), `done` how many steps were done at its end, `saving`
    whether a save was under way then.
    """

    moment: str
    first: int | None
    done: int
    saving: bool


@dataclass(frozen=True)
class Attempt:
    """The words after the recipe's path, and where this attempt's own files go."""

    recipe: Path
    overrides: tuple[str, ...]
    run_dir: Path
    ranks: int
    scratch: Path


Rank = tuple[multiprocessing.process.BaseProcess, Connection]


def fire(attempt: Attempt, shot: Shot | None = None) -> Outcome:
    """Runs until it ends or is shot. Raises FireError for a rank that fails unasked, or hangs."""
    attempt.scratch.mkdir(parents=True, exist_ok=True)
    resumed = (attempt.run_dir / "checkpoints" / "latest").exists()
    port = _free_port()
    ranks = [_start(attempt, rank, port, shot) for rank in range(attempt.ranks)]
    try:
        if shot is not None and _await_moment(attempt, ranks, shot):
            return _kill(attempt, ranks, shot, resumed)
        _await_end(attempt, ranks)
        return _outcome(_all_marks(attempt), "")
    finally:
        for process, connection in ranks:
            process.kill()
            process.join()
            connection.close()


def ask(function: Callable[..., str], *arguments: object) -> str:
    """What a function says that needs the engines' imports: it runs in a fork of the server."""
    ours, theirs = _server().Pipe(duplex=False)
    process = _server().Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv_bytes().decode() if ours.poll(LIMIT_SECONDS) else "no answer"
    except EOFError:
        return f"{function.__name__} failed, see above"
    finally:
        process.kill()
        process.join()
        ours.close()


def output(attempt: Attempt) -> str:
    """What the ranks of the attempt have printed."""
    paths = [attempt.scratch / f"rank-{rank}.txt" for rank in range(attempt.ranks)]
    return "\n".join(f"--- rank {rank}\n{path.read_text()}" for rank, path in enumerate(paths) if path.exists())


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


def _start(attempt: Attempt, rank: int, port: int, shot: Shot | None) -> Rank:
    from megatron_sbn.tracking.mlflow_settings import configure_mlflow

    ours, theirs = _server().Pipe()
    make_marks(_marks(attempt, rank))
    ambush = shot.ambush if shot is not None and shot.watched == rank else None
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(attempt.ranks),
        "LOCAL_WORLD_SIZE": str(attempt.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SBN_LAUNCHED": "1",  # ends with the server, as a rank does with its launcher
    }
    with mock.patch.dict(os.environ, ENVIRONMENT):
        configure_mlflow()  # the server's engines import mlflow, which reads these
        process = _server().Process(target=_rank_main, args=(attempt, environment, ambush, theirs))
        process.daemon = True
        process.start()
    theirs.close()
    return process, ours


def _rank_main(attempt: Attempt, environment: dict[str, str], ambush: Ambush | None, parent: Connection) -> None:
    import torch

    from megatron_sbn import train

    os.environ |= environment
    rank = int(environment["RANK"])
    printed = os.open(attempt.scratch / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    torch.set_num_threads(1)
    watch = Watch(attempt.run_dir, _marks(attempt, rank), ambush, parent)
    watch.install()
    status = train.main([str(attempt.recipe), *attempt.overrides, f"run_dir={attempt.run_dir}"])
    watch.leave()
    os._exit(status)


def _answer(connection: Connection, function: Callable[..., str], arguments: tuple[object, ...]) -> None:
    connection.send_bytes(function(*arguments).encode())


def _await_moment(attempt: Attempt, ranks: Sequence[Rank], shot: Shot) -> bool:
    """Whether the moment of the shot came before all had ended."""
    deadline = time.monotonic() + (LIMIT_SECONDS if shot.ambush else shot.seconds)
    sentinels = {process.sentinel: process for process, _ in ranks}
    watched = ranks[shot.watched][1]
    while sentinels:
        left = deadline - time.monotonic()
        if left <= 0:
            if shot.ambush is not None:
                raise FireError(_hung(attempt, ranks))
            return True
        ready = wait([*sentinels, *([watched] if shot.ambush else [])], left)
        if watched in ready and _notified(watched):
            time.sleep(shot.seconds)
            return True
        for sentinel in [sentinel for sentinel in sentinels if sentinel in ready]:
            process = sentinels.pop(sentinel)
            process.join()
            if process.exitcode:
                raise FireError(f"a rank ended with {process.exitcode} by itself\n{output(attempt)}")
    return False


def _notified(connection: Connection) -> bool:
    try:
        return connection.recv_bytes() == b"here"
    except EOFError:  # it has ended
        return False


def _await_end(attempt: Attempt, ranks: Sequence[Rank]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    for process, _ in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    if any(process.is_alive() for process, _ in ranks):
        raise FireError(_hung(attempt, ranks))
    statuses = [process.exitcode for process, _ in ranks]
    if any(statuses):
        raise FireError(f"ranks ended with {statuses}\n{output(attempt)}")


def _kill(attempt: Attempt, ranks: Sequence[Rank], shot: Shot, resumed: bool) -> Outcome:
    for victim in shot.victims:
        ranks[victim][0].kill()
    for victim in shot.victims:
        ranks[victim][0].join()
    marks = _all_marks(attempt)
    rest = [rank for number, rank in enumerate(ranks) if number not in shot.victims]
    if shot.gentle:
        for process, connection in rest:
            if connection is ranks[shot.watched][1] and shot.ambush is not None and shot.ambush.hold:
                connection.send_bytes(b"go on")
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process, _ in rest:
            process.join(max(0.0, deadline - time.monotonic()))
    return _outcome(marks, _moment(marks, shot.watched, resumed))


def _outcome(marks: Sequence[Marks], moment: str) -> Outcome:
    first = max(mark.first for mark in marks)
    saving = marks[0].stage not in (Stage.NONE, Stage.REMOVING)  # rank 0 is the one that makes a save count
    return Outcome(moment, first if first >= 0 else None, max(mark.done for mark in marks), saving)


def _moment(marks: Sequence[Marks], watched: int, resumed: bool) -> str:
    """Where the run was: by the rank that was watched, or else the one that was furthest."""
    phases = {mark.phase for mark in marks}
    stage = marks[watched].stage or max(mark.stage for mark in marks)
    if Phase.START in phases:
        return "during resume" if resumed else "during start"
    if stage != Stage.NONE:
        return {
            Stage.WRITING: "inside a save",
            Stage.BETWEEN_FILES: "between files of a save",
            Stage.BEFORE_RENAME: "before the rename",
            Stage.BEFORE_LATEST: "before latest is replaced",
            Stage.REMOVING: "after latest is replaced",
        }[stage]
    if Phase.STEP in phases:
        return "in the middle of a step"
    return "after the last step" if Phase.LEAVING in phases else "between steps"


def _marks(attempt: Attempt, rank: int) -> Path:
    return attempt.scratch / f"marks-{rank}"


def _all_marks(attempt: Attempt) -> list[Marks]:
    return [read_marks(_marks(attempt, rank)) for rank in range(attempt.ranks)]


def _hung(attempt: Attempt, ranks: Sequence[Rank]) -> str:
    for process, _ in ranks:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGUSR2)
    time.sleep(0.5)
    return f"ranks did not end within {LIMIT_SECONDS:.0f} s\n{output(attempt)}"


def _free_port() -> int:
    for port in PORTS[os.getpid() % 1000 :: 7]:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise FireError(f"no free port in {PORTS}")
