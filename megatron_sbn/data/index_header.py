"""What little of a token shard says how many tokens there are, and which: the head of its index, ends of its tokens.

    `<9sQBQQ`, little endian: MMIDIDX\\0\\0, version 1, dtype code, sequences, document marks
    tokens = bytes of .bin / bytes of a token

Imports neither torch nor Megatron: at most 2 MiB are read, whatever the size of the shard.
"""

import hashlib
import struct
from pathlib import Path

from megatron_sbn.errors import InputError

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
REMEDY = "write it again with `sbn prepare` or Megatron's preprocess_data.py"
SAMPLE_BYTES = 1 << 20
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # of Megatron-Core's dtype codes; 6 and 7 are floating


def shard_tokens(prefix: str | Path) -> int:
    """Tokens of the shard PREFIX.bin, PREFIX.idx. Raises InputError where one is missing, or is no shard of tokens."""
    index = Path(f"{prefix}.idx")
    try:
        with index.open("rb") as file:
            head = file.read(HEADER.size)
        size = Path(f"{prefix}.bin").stat().st_size
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{prefix}: cannot read the token shard: {reason}") from error
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise InputError(f"{index}: not a Megatron index (MMIDIDX, version 1); {REMEDY}")
    code = HEADER.unpack(head)[2]
    if code not in _TOKEN_BYTES:
        raise InputError(f"{index}: dtype code {code} is no integer type of Megatron's; {REMEDY}")
    return size // _TOKEN_BYTES[code]


def shard_digest(prefix: str) -> str:
    """SHA-256 over the size and the first and last MiB of PREFIX.bin, 16 hexadecimal digits. Raises OSError."""
    path = Path(f"{prefix}.bin")
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as content:
        digest.update(content.read(SAMPLE_BYTES))
        content.seek(max(0, size - SAMPLE_BYTES))
        digest.update(content.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
