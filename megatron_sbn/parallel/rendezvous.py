"""How the ranks of a run find each other: a store at rank 0's address, and a roll call before anything is built.

torch waits for a missing rank for half an hour without a word. Here every rank enters its host in the store, and
those that are there look again and again: who is missing is said every SAY_SECONDS, a request to stop ends the wait at
once, and what can be known at the start (an address without a host, an interface that this machine lacks, a port in
use) is one line.

torchrun keeps one store over its restarts, with what the ranks of the last attempt left in it: whoever connected by
those addresses would wait for the dead. So each attempt has a store of its own in rank 0's process, and its address is
in the launcher's store. The address of a dead rank 0's store answers no more, and is read again until one answers.
"""

import datetime
import errno
import os
import socket
import sys
import time
from collections.abc import Callable

import torch.distributed as dist

from megatron_sbn.errors import RankLostError, RecipeError
from megatron_sbn.launch import environment

TIMEOUT = datetime.timedelta(minutes=30)
SAY_SECONDS = 30.0
_POLL_SECONDS = 0.2
_CONNECTING = datetime.timedelta(seconds=5)
_STORE_KEY = "megatron_sbn/store"


def join(backend: str, look: Callable[[], None]) -> None:
    """Makes the process group of all ranks (environment.py says which).

    Args:
        backend: gloo or nccl.
        look: called again and again while ranks are missing; what it raises ends the wait.

    Raises:
        RecipeError: MASTER_ADDR is missing or has no host, MASTER_PORT is in use, an interface is not there.
        RankLostError: a rank did not come within TIMEOUT.
    """
    rank, world_size = environment.rank(), environment.world_size()
    _check_interface(backend)
    wait = _Wait(look)
    store: dist.Store
    if world_size == 1:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    else:
        store = _store(rank, world_size, wait)
        _call_roll(store, rank, world_size, wait)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)


def _here(message: str) -> RecipeError:
    """An error of this machine's set-up: other ranks may see none, so each speaks for itself."""
    error = RecipeError(message)
    error.on_every_rank = False
    return error


class _Wait:
    """Time that passes while something is missing."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._began = self._said = time.monotonic()

    def pause(self, missing: Callable[[], str]) -> None:
        """A moment's wait. Raises RankLostError, with what is `missing`, when it took too long."""
        self._look()
        now = time.monotonic()
        waited = now - self._began
        if waited > TIMEOUT.total_seconds():
            raise RankLostError(f"waited {waited:.0f} s for {missing()}; look at its log, or whether it was started")
        if now - self._said > SAY_SECONDS:
            self._said = now
            print(f"sbn: rank {environment.rank()} waits for {missing()}, {waited:.0f} s", file=sys.stderr, flush=True)
        time.sleep(_POLL_SECONDS)


def _check_interface(backend: str) -> None:
    """gloo takes names; NCCL beginnings of names, names after "=", and after "^" what not to use."""
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    text = os.environ.get(variable, "")
    there = sorted(name for _, name in socket.if_nameindex())
    exact = backend == "gloo" or text.startswith("=")
    for wanted in filter(None, text.removeprefix("=").split(",")):
        found = wanted in there if exact else any(name.startswith(wanted.partition(":")[0]) for name in there)
        if not found and not text.startswith("^"):
            raise _here(
                f"environment variable {variable} = {text}: no interface {wanted} on {socket.gethostname()}, which has "
                f"{', '.join(there)}; name one of those, or unset it"
            )


def _store(rank: int, world_size: int, wait: _Wait) -> dist.Store:
    if environment.in_srun_task():
        os.environ["MASTER_ADDR"] = environment.master_address()
        os.environ["MASTER_PORT"] = str(environment.master_port())
    if "MASTER_ADDR" not in os.environ:
        raise _here("environment variable MASTER_ADDR is not set; start several ranks with torchrun or srun")
    host, port = os.environ["MASTER_ADDR"], environment.master_port()
    _check_host(host)
    if not environment.store_outlives_ranks():
        return _serve(port, world_size) if rank == 0 else _connect(lambda: (host, port), world_size, wait)
    shared, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=TIMEOUT))
    if rank == 0:
        own = _serve(0, world_size)
        shared.set(_STORE_KEY, f"{host} {own.port}")
        return own

    def address() -> tuple[str, int] | None:
        if not shared.check([_STORE_KEY]):
            return None
        known, number = shared.get(_STORE_KEY).decode().split()
        return known, int(number)

    return _connect(address, world_size, wait)


def _check_host(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise _here(
            f"environment variable MASTER_ADDR = {host}: {error.strerror or error}; name the machine of rank 0 as this "
            "one knows it, or give its IP address"
        ) from None


def _serve(port: int, world_size: int) -> dist.TCPStore:
    """Rank 0's store. torch's own error for a port in use comes after minutes; so the port is tried first."""
    if port:
        with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                raise _here(
                    f"environment variable MASTER_PORT = {port}: in use on {socket.gethostname()}; set another"
                ) from None
    return dist.TCPStore("127.0.0.1", port, world_size, is_master=True, timeout=TIMEOUT, wait_for_workers=False)


def _connect(address: Callable[[], tuple[str, int] | None], world_size: int, wait: _Wait) -> dist.TCPStore:
    """Rank 0's store, as soon as it answers."""
    while True:
        known = address()
        if known is not None and _answers(*known):
            try:
                store = dist.TCPStore(*known, world_size, timeout=_CONNECTING, wait_for_workers=False)
            except dist.DistError:
                pass
            else:
                store.set_timeout(TIMEOUT)
                return store
        place = f" at {known[0]}:{known[1]}" if known else ""
        wait.pause(f"rank 0{place}".format)


def _answers(host: str, port: int) -> bool:
    """Whether something listens there; torch prints a stack for every connection that is refused."""
    try:
        socket.create_connection((host, port), timeout=_CONNECTING.total_seconds()).close()
    except OSError:
        return False
    return True


def _call_roll(store: dist.Store, rank: int, world_size: int, wait: _Wait) -> None:
    """Returns when all ranks are there."""
    per_node = environment.local_world_size()
    store.set(f"here/{rank}", socket.gethostname())
    if store.add("here", 1) == world_size:
        store.set("all here", "1")
    while not store.check(["all here"]):
        wait.pause(lambda: _name_missing(store, world_size, per_node))


def _name_missing(store: dist.Store, world_size: int, per_node: int) -> str:
    """The ranks that are not there, as ranges, with their nodes where ranks are numbered node by node."""
    there = [store.check([f"here/{rank}"]) for rank in range(world_size)]
    missing = [rank for rank in range(world_size) if not there[rank]]
    if not missing:
        return "the last rank to begin"
    shown = ranges(missing)
    nodes = -(-world_size // per_node)
    if nodes == 1:
        return f"{shown} of {world_size}"
    of_nodes = []
    for number in sorted({rank // per_node for rank in missing}):
        members = range(number * per_node, min((number + 1) * per_node, world_size))
        host = next((store.get(f"here/{rank}").decode() for rank in members if there[rank]), None)
        of_nodes.append(f"node {number}" + (f" ({host})" if host else ""))
    more = f" and {len(of_nodes) - 4} nodes" if len(of_nodes) > 4 else ""
    return f"{shown} of {world_size}, on {', '.join(of_nodes[:4])}{more} of {nodes} nodes"


def ranges(numbers: list[int]) -> str:
    """Ascending rank numbers in words: rank 3; ranks 0 to 7, 12."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    shown = [str(a) if a == b else f"{a} to {b}" for a, b in found]
    more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(shown[:6])}{more}"
