"""Zstandard files with windows of up to 2 GiB, which archives of large crawls use (`zstd --long=31`).

libzstd refuses windows of more than 128 MiB unless it is told otherwise, and pyarrow cannot tell it. A file is read in
pieces of PIECE bytes: a block of 4 bytes can stand for 128 KiB, so what one piece becomes is bounded by 64 MiB. Memory
is that and the window that the file was written with, once a file being read.
"""

from typing import IO

from megatron_sbn.errors import InputError

MAX_WINDOW = 1 << 31
PIECE = 2048


class CorruptFileError(OSError):
    """A compressed file that is cut or damaged, or no compressed file at all."""


class ZstdReader:
    """Reads what a file of Zstandard frames holds, one frame behind the other."""

    def __init__(self, raw: IO[bytes]) -> None:
        try:
            import zstandard
        except ModuleNotFoundError:
            raise InputError("reading .zst takes the package zstandard: pip install zstandard") from None
        self._raw = raw
        self._damage = zstandard.ZstdError
        self._decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._frame = self._decoder.decompressobj()
        self._within_frame = False
        self._left = b""  # of the file, read already

    def read(self, size: int = -1) -> bytes:
        """At least `size` bytes, unless the file ends; all that is left without `size`. b"" is the end.

        Raises CorruptFileError where the file is damaged or ends within a frame.
        """
        pieces: list[bytes] = []
        count = 0
        while size < 0 or count < size:
            piece = self._left or self._raw.read(PIECE)
            self._left = b""
            if not piece:
                if self._within_frame:
                    raise CorruptFileError("ends within a frame: cut short")
                break
            made = self._decompress(piece)
            pieces.append(made)
            count += len(made)
        return b"".join(pieces)

    def _decompress(self, piece: bytes) -> bytes:
        try:
            made: bytes = self._frame.decompress(piece)
        except (self._damage, MemoryError) as error:
            raise CorruptFileError(str(error) or "not enough memory for its window") from error
        self._within_frame = not self._frame.eof
        if self._frame.eof:
            self._left = self._frame.unused_data
            self._frame = self._decoder.decompressobj()
        return made
