"""Standard output and error of a rank whose reader may leave: `sbn train | head`, a closed terminal.

What it prints is in logs/ as well, so training goes on; the stream is lost from then on. Imports no torch.
"""

import errno
import io
import os
import sys
from collections.abc import Iterable

_GONE = (errno.EPIPE, errno.EIO, errno.ENOTCONN)  # a pipe's reader, a terminal, a socket


class _Stream(io.TextIOWrapper):
    """A text stream that leads to nowhere from the moment on at which nobody reads it."""

    def write(self, text: str) -> int:
        """As any text stream's."""
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:  # type: ignore[override]
        """As any text stream's."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As any text stream's."""
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno not in _GONE:
            raise error
        # By number, so that what is buffered here, C++ libraries and child processes meet no error either.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def outlive_reader() -> None:
    """Replaces sys.stdout and sys.stderr, where they are streams of this process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:
            encoding, errors, lines = stream.encoding, stream.errors, stream.line_buffering
            setattr(sys, name, _Stream(stream.detach(), encoding, errors, line_buffering=lines))
