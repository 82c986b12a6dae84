"""Files that appear under their final name whole or not at all.

A file is written as `.NAME.partial` in the folder of its final name (so that the rename stays inside one file system),
flushed to the disk, and renamed. A failure removes the partial files; a killed process leaves them, under names that
nothing reads, and the next run overwrites them. A lock per output keeps two runs from writing the same partial files.
"""

import contextlib
import errno
import fcntl
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_sbn.errors import InputError

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def partial_path(path: Path) -> Path:
    """Where the file that will be called `path` is written: same folder, a hidden name."""
    return path.with_name(f".{path.name}.partial")


def flush_to_disk(path: Path) -> None:
    """fsync a file (or a folder: its list of names). Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged(
    paths: Sequence[Path], *, obsolete: Sequence[Path] = (), partials: Sequence[Path] | None = None
) -> Iterator[None]:
    """Rename the partial files of `paths` to their final names, in that order, if the body succeeds; else remove them.

    `obsolete` files are removed before the first rename: those that would be wrong beside a new file of another name
    (the index of the previous run). `partials` are other names for the partial files than those of `partial_path`.
    Raises InputError where the folder cannot be written or the disk is full, and for a device, pipe or folder, in whose
    place a rename would put a file.
    """
    partials = partials or [partial_path(path) for path in paths]
    for path in paths:
        with contextlib.suppress(OSError):  # a name that cannot be is met when it is written
            if path.exists() and not path.is_file():
                raise InputError(f"{path}: is no file that can be written anew; name another")
    try:
        yield
        for partial in partials:
            flush_to_disk(partial)
        for path in obsolete:
            path.unlink(missing_ok=True)
        for partial, path in zip(partials, paths, strict=True):
            partial.replace(path)
        for folder in {path.parent for path in paths}:
            flush_to_disk(folder)
    except OSError as error:
        name = paths[0] if error.filename in map(str, partials) else error.filename or paths[0]
        raise InputError(f"{name}: cannot be written: {error.strerror or error}") from error
    finally:
        for partial in partials:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all. Raises InputError where it cannot be written.

    Its partial file is this thread's own: of several writers at once, such as a run and `sbn sync`, the last one wins.
    """
    try:
        partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.partial")
        with staged([path], partials=[partial]):
            partial.write_bytes(content)
    except ValueError as error:  # a path that no file can have
        raise InputError(f"{path}: cannot be written: {error}") from error


def make_folder(path: Path) -> Path:
    """Makes a folder, and those above it, unless it is there. Raises InputError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be made a folder: {reason}; name another") from error
    return path


@contextlib.contextmanager
def exclusive(prefix: Path) -> Iterator[None]:
    """Hold the lock of the output `prefix`; InputError if another process writes there or the folder cannot be written.

    The kernel drops the lock of a killed process. Where the file system has no locks, a line says so and work goes on.
    """
    try:
        lock = prefix.with_name(f".{prefix.name}.lock")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{prefix.parent}: cannot write the output there: {error.strerror or error}") from error
    except ValueError as error:  # a path that no file can have
        raise InputError(f"{prefix}: cannot write the output there: {error}") from error
    try:
        if not _acquired(descriptor, lock):
            raise InputError(f"{prefix}: another process is writing this output; wait for it or name another")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def is_held(prefix: Path) -> bool | None:
    """Whether a process holds the lock of the output `prefix`; None where that cannot be known."""
    try:
        descriptor = os.open(prefix.with_name(f".{prefix.name}.lock"), os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def _acquired(descriptor: int, lock: Path) -> bool:
    """Take the lock now, if it is free; one whose file is gone was another's until a moment ago."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise InputError(f"{lock}: cannot be locked: {error.strerror}") from error
        print(f"{lock}: this file system has no locks; start one writer of this output only", file=sys.stderr)
    return os.fstat(descriptor).st_nlink > 0


@contextlib.contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Waits until no other process is between its start and its end at this path (a file, made if it is not there).

    A file system without locks is gone on with.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
