"""Rows of results.csv: one a contender and case, appended when a case is done; docs/benchmarks.md explains the columns.

What a row needs beside its times: the machine and versions (`Environment`), and what the machine could do in the same
run (`Ceilings`, measured by ceilings.py).
"""

import csv
import io
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton
from harness import Case, Result

RESULTS = Path(__file__).with_name("results.csv")
"""Where rows go."""

COLUMNS = (
    *("timestamp", "device", "torch", "triton", "commit", "kernel", "contender", "role"),
    *("layer", "tokens", "out", "in", "sparsity", "dtype", "samples", "p20_ms", "p50_ms", "p80_ms", "enqueue_ms"),
    *("gb_per_s", "tflop_per_s", "times_ours", "ceiling", "share"),
)
"""Header of the file."""

Ceilings = Mapping[str, float]
"""Ceiling -> bytes or operations a second, of `ceilings.CEILINGS`; those that could not be measured are missing."""


@dataclass(frozen=True)
class Environment:
    """Where a run took place: `commit` ends in "+" if tracked files differ from it, and is "" outside of git."""

    device: str
    torch: str
    triton: str
    commit: str


def device_name(device: torch.device) -> str:
    """Model of the GPU, or of the CPU with the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(models or ['CPU'])[0]}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(RESULTS.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment(device: torch.device) -> Environment:
    """Describe this run; results.csv itself does not make a commit dirty."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){RESULTS}")
    return Environment(device_name(device), torch.__version__, triton.__version__, commit + ("+" if changed else ""))


def share(case: Case, milliseconds: float, ceilings: Ceilings) -> float | None:
    """The part of its ceiling that a time is: bytes of "copy", else operations; None if that was not measured."""
    if case.ceiling not in ceilings:
        return None
    work = case.bytes_moved if case.ceiling == "copy" else case.operations
    return work / (milliseconds * 1e-3) / ceilings[case.ceiling]


def rows(result: Result, where: Environment, ceilings: Ceilings) -> Iterator[dict[str, str]]:
    """The rows of a result, a dictionary by `COLUMNS` for each contender that was measured."""
    case = result.case
    ours = result.milliseconds(result.ours) if result.ours else None
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for name, measured in result.measured.items():
        seconds = measured.median * 1e-3
        whole = measured.role != "raw"
        part = share(case, measured.median, ceilings) if whole else None
        values = {
            **{"timestamp": now, "device": where.device, "torch": where.torch, "triton": where.triton},
            **{"commit": where.commit, "kernel": case.kernel, "contender": name, "role": measured.role},
            **{"layer": case.layer, "tokens": str(case.tokens), "out": str(case.out_features)},
            **{"in": str(case.in_features), "sparsity": case.sparsity, "dtype": case.dtype},
            **{"samples": str(len(measured.samples)), "enqueue_ms": f"{measured.enqueue:.4f}"},
            **{f"p{percent}_ms": f"{measured.percentile(percent):.4f}" for percent in (20, 50, 80)},
            "gb_per_s": f"{case.bytes_moved / seconds / 1e9:.2f}" if whole else "",
            "tflop_per_s": f"{case.operations / seconds / 1e12:.4f}" if whole and case.operations else "",
            "times_ours": f"{measured.median / ours:.3f}" if ours else "",
            "ceiling": case.ceiling,
            "share": "" if part is None else f"{part:.3f}",
        }
        yield {column: values[column] for column in COLUMNS}


def append(path: Path, new: Sequence[Mapping[str, str]]) -> None:
    """Append rows to a CSV file in one write, after a header if the file is new.

    Raises:
        ValueError: the file has another header.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    there = path.read_text(encoding="utf-8") if path.exists() else ""
    if not there:
        writer.writeheader()
    elif there.partition("\n")[0] != ",".join(COLUMNS):
        raise ValueError(f"{path} has other columns than this version writes: move it away, or use --no-record")
    writer.writerows(new)
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())
