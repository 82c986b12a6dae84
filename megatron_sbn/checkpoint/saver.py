"""Saving beside training: the loop waits for the copy to host memory, a thread of each rank writes it.

    start    all ranks: the room on the disk, an empty folder, the copy; then threads write, flush and hash
    poll     between steps: when every rank's thread is done, rank 0 writes the manifest, renames, replaces `latest`
    finish   waits for that

Threads talk to nobody: ranks learn of each other at step boundaries, by one small all-reduce while a save is in flight.
One save is in flight at a time. A failure (a full disk, no permission) removes what was written and leaves the older
checkpoints as they are; the run stops or goes on, as `checkpoint.on_failure` says.
"""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sbn.atomic_files import flush_to_disk
from megatron_sbn.checkpoint import directory as folders
from megatron_sbn.checkpoint.collective_errors import capture_error, first_error_on_any_rank
from megatron_sbn.checkpoint.manifest import MANIFEST, STATE, State, manifest_text, state_text
from megatron_sbn.checkpoint.run_state import ResumableState
from megatron_sbn.checkpoint.shards import Chunk, Written, describe, merge, write_chunks
from megatron_sbn.config import Checkpoint
from megatron_sbn.errors import CheckpointError
from megatron_sbn.text_table import size_text


@dataclass
class _Flight:
    """A save that is being written."""

    state: State
    thread: threading.Thread
    written: Written | None = None
    problem: str = ""


def to_host(chunks: list[Chunk]) -> list[Chunk]:
    """Copies in host memory; from a GPU through pinned memory, which PyTorch keeps for the next save."""
    copies = []
    for chunk in chunks:
        host = torch.empty(chunk.value.shape, dtype=chunk.value.dtype, pin_memory=chunk.value.is_cuda)
        copies.append(replace(chunk, value=host.copy_(chunk.value.detach(), non_blocking=True)))
    if any(chunk.value.is_cuda for chunk in chunks):
        torch.cuda.synchronize()
    return copies


class Saver:
    """Saves one run's contents into `folder`, on all ranks together. Its methods are called by all of them.

    Args:
        say: takes a line for people, on every rank.
    """

    def __init__(
        self, folder: Path, contents: ResumableState, settings: Checkpoint, say: Callable[[str], None]
    ) -> None:
        self.folder = folder
        self.contents = contents
        self.settings = settings
        self.parallel = contents.parallel
        self.published: int | None = None  # the step of the last one that was completed, or that the run goes on from
        self._say = say
        self._flight: _Flight | None = None
        self._retiring: threading.Thread | None = None

    def save(self, state: State) -> None:
        """Saves the contents as they are now; returns when they are copied, or with `asynchronous` off, when saved.

        Raises CheckpointError on every rank when one cannot write and `on_failure` is "stop".
        """
        self.finish()
        chunks = list(self.contents.chunks())
        size = self._total(sum(chunk.value.nbytes for chunk in chunks))
        with capture_error() as preparing:
            if self.parallel.rank == 0:
                self._make_room(state.step, size)
        if self._failed(state.step, first_error_on_any_rank(preparing.problem, self.parallel)):
            return
        self._launch(state, to_host(chunks))
        if not self.settings.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Completes the save in flight, if every rank has written its part. Raises as `save` does."""
        if self._flight is None:
            return
        pending = torch.tensor(int(self._flight.thread.is_alive()), dtype=torch.int32, device=self.parallel.device)
        dist.all_reduce(pending)
        if not pending:
            self.finish()

    def finish(self) -> None:
        """Waits for the save in flight, if there is one, and completes it. Raises as `save` does."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.thread.join()
            if flight.written is None and not flight.problem:
                flight.problem = "the writing thread ended without a result; see the log"
            self._complete(flight)
        if self._retiring is not None:
            self._retiring.join()
            self._retiring = None

    def go_back(self, step: int) -> None:
        """Puts the checkpoint of `step` in force, from which the run goes on. Raises CheckpointError on every rank."""
        self.published = step
        with capture_error() as pointing:
            if self.parallel.rank == 0:
                folders.set_latest(self.folder, step)
        problem = first_error_on_any_rank(pointing.problem, self.parallel)
        if problem:
            error = CheckpointError(problem)
            error.on_every_rank = True
            raise error

    def _launch(self, state: State, chunks: list[Chunk]) -> None:
        path, rank = folders.partial(self.folder, state.step), self.parallel.rank

        def write() -> None:
            with capture_error() as writing:
                flight.written = write_chunks(path, rank, chunks)
            flight.problem = writing.problem

        flight = _Flight(state, threading.Thread(target=write, name="checkpoint", daemon=True))
        self._flight = flight
        flight.thread.start()

    def _complete(self, flight: _Flight) -> None:
        step = flight.state.step
        if self._failed(step, first_error_on_any_rank(flight.problem, self.parallel)):
            return
        first = self.parallel.rank == 0
        parts: list[Written | None] | None = [None] * self.parallel.world_size if first else None
        dist.gather_object(flight.written, parts)
        with capture_error() as publishing:
            if parts is not None:
                self._publish(flight.state, parts)
        if self._failed(step, first_error_on_any_rank(publishing.problem, self.parallel)):
            return
        self.published = step
        self._say(f"step {step}: saved {self.folder / folders.step_name(step)}")
        if first:
            self._retiring = threading.Thread(target=self._retire, name="retire", daemon=True)
            self._retiring.start()

    def _publish(self, state: State, parts: list[Written | None]) -> None:
        path = folders.partial(self.folder, state.step)
        (path / STATE).write_bytes(state_text(state))
        own = Written({STATE: describe(path / STATE)}, {})
        (path / MANIFEST).write_bytes(manifest_text(merge([own, *(part for part in parts if part is not None)])))
        flush_to_disk(path / MANIFEST)
        flush_to_disk(path)
        folders.publish(self.folder, state.step, self.published)

    def _retire(self) -> None:
        with capture_error() as retiring:
            folders.prune(self.folder, self.settings.keep, self.settings.keep_every)
        if retiring.problem:
            self._say(f"an old checkpoint cannot be removed: {retiring.problem}")

    def _make_room(self, step: int, size: int) -> None:
        """An empty folder on a disk with room for `size` bytes; on rank 0."""
        folders.begin(self.folder, step)
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise CheckpointError(f"it takes {size_text(size)}, and {size_text(free)} are free")

    def _total(self, own: int) -> int:
        total = torch.tensor(own, dtype=torch.int64, device=self.parallel.device)
        dist.all_reduce(total)
        return int(total)

    def _failed(self, step: int, problem: str) -> bool:
        """Whether there is a problem; then nothing of this save is left. Raises CheckpointError where a run stops."""
        if not problem:
            return False
        if self.parallel.rank == 0:
            folders.discard(self.folder, step)
        message = (
            f"{self.folder / folders.step_name(step)}: cannot be saved: {problem}; the older ones are as they were"
        )
        if self.settings.on_failure == "continue":
            self._say(f"{message}; training goes on (checkpoint.on_failure = continue)")
            return True
        error = CheckpointError(f"{message}; make room or name another run_dir, and start it again")
        error.on_every_rank = True
        raise error
