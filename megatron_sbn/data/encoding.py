"""Documents to tokens in parallel: blocks go to worker processes, results come back in the order of the blocks.

What comes out does not depend on the number of workers. At most four blocks a worker are under way, so memory is
bounded whatever the corpus (by the largest single document or parquet row group). Workers import neither torch nor
Megatron.
"""

import collections
import concurrent.futures
import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_sbn.data.readers import BadRecord, Block, blocks, documents
from megatron_sbn.data.tokenizer import TextTokenizer, load_tokenizer
from megatron_sbn.errors import SbnError

_BLOCKS_PER_WORKER = 4


class EncodingJob(NamedTuple):
    """What every block is encoded with. `digest` is the model file's sha256: a worker's cached model is that one.

    `eod` names the token that ends documents; None is the tokenizer's own.
    """

    tokenizer: str
    digest: str
    text_field: str
    validation_fraction: float
    seed: int
    eod: str | None = None


class Encoded(NamedTuple):
    """One block's documents: tokens (eod included) one document behind the other, and what was not usable.

    `text_bytes` are those of UTF-8, `unknown` counts unknown tokens, `size` is in bytes of the file.
    """

    tokens: np.ndarray  # int32 [tokens]
    lengths: np.ndarray  # int64 [documents]
    held_out: np.ndarray  # bool [documents]
    text_bytes: np.ndarray  # int64 [documents]
    unknown: int
    empty: int
    bad: list[BadRecord]
    size: int


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a document is for validation: a hash of its text and `seed`, uniform in [0, 1), is below `fraction`.

    By content, so neither order nor file names matter and copies of a document never stand on both sides.
    """
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def encode_block(job: EncodingJob, block: Block) -> Encoded:
    """Tokens of one block: every document's, then the end-of-document token. A document without text is left out."""
    tokenizer = _load(job.tokenizer, job.digest, job.eod)
    parts, lengths, held_out, text_bytes, bad = [], [], [], [], []
    unknown = empty = 0
    eod = np.array([tokenizer.eod], dtype=np.int32)
    for item in documents(block, job.text_field):
        if isinstance(item, BadRecord):
            bad.append(item)
        elif not item.text:
            empty += 1
        else:
            tokens = tokenizer.encode_array(item.text)
            parts += [tokens, eod]
            unknown += int(np.count_nonzero(tokens == tokenizer.unknown))
            lengths.append(len(tokens) + 1)
            held_out.append(is_held_out(item.text, job.validation_fraction, job.seed))
            text_bytes.append(len(item.text.encode()))
    joined = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    sizes = [np.array(values, np.int64) for values in (lengths, text_bytes)]
    return Encoded(joined, sizes[0], np.array(held_out, bool), sizes[1], unknown, empty, bad, block.size)


def encode_files(files: Sequence[Path], job: EncodingJob, workers: int) -> Iterator[Encoded]:
    """Every block of every file, encoded, in order; one worker means this process.

    Where there is no shared memory for more, this process works alone, and a line on standard error says so.
    Raises what `readers.blocks` and `readers.documents` do, and SbnError when a worker process dies.
    """
    stream = (block for path in files for block in blocks(path))
    executor = _workers(workers) if workers > 1 else None
    if executor is None:
        for block in stream:
            yield encode_block(job, block)
        return
    pending: collections.deque[concurrent.futures.Future[Encoded]] = collections.deque()
    with executor as pool:
        try:
            for block in stream:
                pending.append(pool.submit(encode_block, job, block))
                if len(pending) >= _BLOCKS_PER_WORKER * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise SbnError("a tokenization worker died (out of memory?); try again with fewer --workers") from error
        finally:
            for future in pending:
                future.cancel()


def _workers(count: int) -> concurrent.futures.ProcessPoolExecutor | None:
    """Processes to work in; None where the system has no semaphores for them (/dev/shm is full or read-only)."""
    spawn = multiprocessing.get_context("spawn")
    try:
        return concurrent.futures.ProcessPoolExecutor(count, mp_context=spawn, initializer=_start_worker)
    except (OSError, ImportError, NotImplementedError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        print(
            f"sbn: warning: --workers {count} takes semaphores in /dev/shm, which cannot be made ({reason}): "
            "tokenizing with one process",
            file=sys.stderr,
        )
        return None


@functools.lru_cache(maxsize=1)
def _load(path: str, digest: str, eod: str | None) -> TextTokenizer:
    """The tokenizer, once a process; `digest` makes a rewritten file another one."""
    return load_tokenizer(path, eod)


def _start_worker() -> None:
    """An interrupt is the parent's to handle, and a worker does not outlive it, not even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
