"""How far a long job over files is: a bar on a terminal, a plain line now and then in a log."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from tqdm import tqdm


class Progress:
    """Counts bytes of `total` on stderr, in a log every `interval` seconds and at the end."""

    def __init__(self, total: int, label: str, interval: float = 15.0) -> None:
        self._total = total
        self._label = label
        self._interval = interval
        self._done = 0
        self._detail = ""
        self._printed = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=label, file=sys.stderr) if terminal else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._tell()

    def advance(self, size: int, detail: str) -> None:
        """`size` bytes more are done; `detail` says what came of them so far."""
        self._done += size
        self._detail = detail
        if self._bar is not None:
            self._bar.set_postfix_str(detail, refresh=False)
            self._bar.update(size)
        elif time.monotonic() - self._printed >= self._interval:
            self._tell()

    def _tell(self) -> None:
        self._printed = time.monotonic()
        percent = 100 * self._done // max(self._total, 1)
        print(f"{self._label}: {percent}% of {self._total / 1e6:.1f} MB, {self._detail}", file=sys.stderr)


@contextlib.contextmanager
def elapsed(label: str, interval: float = 15.0) -> Iterator[None]:
    """For work that cannot be counted: `label` at its begin, every `interval` seconds, and when it is done."""
    began = time.monotonic()
    done = threading.Event()

    def tell() -> None:
        while not done.wait(interval):
            print(f"{label}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    print(label, file=sys.stderr, flush=True)
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
    print(f"{label}: done in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
