"""Which candidate serves a shape: measured once, remembered on disk.

    choose("ternary_linear", {"tokens": 4096, "out": 2048, ...}, {"128x256": run_a, "128x128": run_b}, device=device)

returns the name of the fastest candidate. The table is the file `tuning.json` in $SBN_KERNELS_CACHE, or in
~/.cache/sbn_kernels: readable JSON with every median, so that a choice can be looked up and doubted. An entry
belongs to one operation, device model, version of torch and of Triton, and key. Delete the file to measure again.

A home folder that cannot be written (a container, a compute node) costs a warning: choices are then remembered by this
process alone. A folder that $SBN_KERNELS_CACHE names has to be writable.

Processes share the table: it is read again before it is written, and replaced whole (written aside, then renamed). Of
two that measure one key at the same time the later one stays; both are fast.
"""

import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from sbn_kernels.gpu.primitives.tiles import Tile

_CPU_RUNS = 5
_VARIABLE = "SBN_KERNELS_CACHE"
_log = logging.getLogger("sbn_kernels")


def bucket_tokens(tokens: int) -> int:
    """The smallest power of two that is at least `tokens`, and at least 1: token counts that share a measurement."""
    return 1 << max(tokens - 1, 0).bit_length()


def table_path() -> Path:
    """Where the measurements are kept (see the module)."""
    folder = os.environ.get(_VARIABLE)
    if folder:
        return Path(folder).expanduser() / "tuning.json"
    return Path(os.path.expanduser("~"), ".cache", "sbn_kernels", "tuning.json")  # noqa: PTH111 - there may be no home


def check_table() -> None:
    """Raise ValueError if the table is damaged, or OSError as `choose` does: to be asked before work begins."""
    path = table_path()
    _read(path)
    _write(path, {})


def choose(
    operation: str,
    key: Mapping[str, int | str],
    candidates: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
) -> str:
    """Return the name of the candidate that is fastest for `key` on `device`.

    Nothing is measured when there is one candidate. A candidate that needs more shared memory or registers than the GPU
    has is passed over. Measuring synchronises the device, and a candidate runs many times: it must not change its
    inputs.

    Args:
        operation: what is being chosen for, a public function's name.
        key: what the choice depends on; token counts through `bucket_tokens`.
        candidates: name -> a call that runs it, best guess first.
        device: where they run.

    Raises:
        ValueError: no candidates, or the table is damaged.
        OSError: the folder that $SBN_KERNELS_CACHE names cannot be written.
        triton.runtime.errors.OutOfResources: no candidate fits the GPU.
    """
    if not candidates:
        raise ValueError(f"{operation}: there are no candidates to choose from")
    if len(candidates) == 1:
        return next(iter(candidates))
    path, entry = table_path(), _entry_name(operation, key, device)
    table = _remembered(path)
    if table.get(entry, {}).get("chosen") not in candidates:
        table.update(_read(path))  # another process may have measured since
    if table.get(entry, {}).get("chosen") not in candidates:
        medians = _measure(candidates, device)
        table[entry] = {"chosen": min(medians, key=medians.__getitem__), "milliseconds": medians}
        _write(path, {entry: table[entry]})
    return str(table[entry]["chosen"])


def pick_tile(
    operation: str,
    key: Mapping[str, int | str],
    tiles: Sequence[Tile],
    run: Callable[[Tile], object],
    *,
    device: torch.device,
    config: Tile | None = None,
) -> Tile:
    """Return `config` if it is given, else the tile with which `run` is fastest: see `choose` for the rest."""
    if config is not None:
        return config
    by_name = {tile.name: tile for tile in tiles}
    chosen = choose(operation, key, {name: partial(run, tile) for name, tile in by_name.items()}, device=device)
    return by_name[chosen]


@lru_cache(maxsize=16)
def _device_name(device: torch.device) -> str:
    """Model and compute capability of a GPU, or the model of the CPU."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _entry_name(operation: str, key: Mapping[str, int | str], device: torch.device) -> str:
    """What an entry is called in the table: a line that can be read, and searched for."""
    described = " ".join(f"{name}={key[name]}" for name in sorted(key))
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"{operation}: {described} | {_device_name(device)} | {versions}"


def _measure(candidates: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median milliseconds of each candidate that fits the device."""
    medians: dict[str, float] = {}
    misfit: OutOfResources | None = None
    for name, run in candidates.items():
        try:
            medians[name] = _median_milliseconds(run, device)
        except OutOfResources as error:
            misfit = error
    if not medians and misfit is not None:
        raise misfit
    return medians


def _median_milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, after a call that compiles and warms up."""
    if device.type == "cuda":
        return float(triton.testing.do_bench(run, return_mode="median"))
    run()
    times = []
    for _ in range(_CPU_RUNS):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


@lru_cache(maxsize=8)
def _remembered(path: Path) -> dict[str, Any]:
    """This process's copy of a table, which `choose` adds to."""
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    """The table in a file; empty if there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    try:
        table = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and kernels are measured again") from error
    whole = isinstance(table, dict) and all(isinstance(e, dict) and "chosen" in e for e in table.values())
    if not whole:
        raise ValueError(f"{path} is not a table of measurements: delete it, and kernels are measured again")
    return dict(table)


def _write(path: Path, entries: Mapping[str, Any]) -> None:
    """Add entries to the table on disk."""
    merged = {**_read(path), **entries}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(merged, file, indent=1, sort_keys=True)
        Path(file.name).replace(path)
    except OSError as error:
        if os.environ.get(_VARIABLE):
            raise OSError(f"{path} cannot be written ({error}): set {_VARIABLE} to a folder that can") from error
        _warn_once(
            f"{path} cannot be written ({error.strerror}): kernels are measured again at every start; {_VARIABLE}"
        )


@lru_cache(maxsize=1)
def _warn_once(message: str) -> None:
    _log.warning("%s names a folder to remember them in", message)
