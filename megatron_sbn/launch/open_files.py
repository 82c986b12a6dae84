"""Room for many open files: a run keeps one for each of its shards, and the usual soft limit is 1,024.

The soft limit of a process may be raised up to the hard one by the process itself.
"""

import os
import resource
from pathlib import Path

from megatron_sbn.errors import InputError

RESERVE = 512  # sockets, logs, checkpoints, libraries that are loaded later


def allow_open_files(count: int) -> None:
    """Makes room for `count` files more. Raises InputError where the hard limit is below that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _open_now() + count + RESERVE
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        if hard >= needed - RESERVE // 2:
            return
        raise InputError(
            f"data: {count:,} shards take {needed:,} open files, and a process may have {hard:,} (ulimit -Hn); raise "
            "that limit, or prepare the text into fewer shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _open_now() -> int:
    """Files that this process has open."""
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - as many names as files
    except OSError:
        return sum(Path(f"/dev/fd/{number}").exists() for number in range(256))
