"""A rank whose reader leaves goes on."""

import subprocess
import sys

import pytest

WRITES = """
import os, sys
from megatron_sbn.launch.output import outlive_reader
outlive_reader()
for number in range(5000):
    print(f"line {number}", flush=True, file=getattr(sys, sys.argv[1]))
print("done", file=sys.stdout if sys.argv[1] == "stderr" else sys.stderr)
os.write(1, b"")
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_reader_of_a_stream_leaves(stream: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITES, stream], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        read, other = (process.stdout, process.stderr) if stream == "stdout" else (process.stderr, process.stdout)
        assert read is not None
        assert other is not None
        assert read.readline() == "line 0\n"
        read.close()
        assert other.read() == "done\n"
        assert process.wait() == 0


def test_a_full_disk_is_still_an_error() -> None:
    script = "from megatron_sbn.launch.output import outlive_reader\noutlive_reader()\nprint('x', flush=True)"
    with open("/dev/full", "w") as full:  # noqa: PTH123 - not a file
        done = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0
    assert "No space left" in done.stderr
