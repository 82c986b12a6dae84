"""system_metrics.jsonl: how busy rank 0's machine is while a run trains, sampled by a thread beside it.

    {"step": 12, "time": 1767225600.25, "system/cpu_utilization_percentage": 93.1, ...}

`step` counts the samples of the run folder and goes on when a job starts again; `time` is the sample's. The file has
the form of metrics.jsonl and goes to MLflow the same way (tracking/pending_points.py), so samples survive a server that
is away.
MLflow's own monitor is not used: it talks to the server for every sample and ends for good at the first failure. The
names are those of its monitor, for which MLflow's UI has a page of its own.

Nothing here can end a run: what fails is one warning. docs/metrics.md defines the names.
"""

import csv
import logging
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

import psutil

from megatron_sbn.errors import InputError
from megatron_sbn.runs.folder import SYSTEM_METRICS
from megatron_sbn.runs.metrics_file import MetricsFile, read_metrics

PREFIX = "system/"
QUERY = ("index", "utilization.gpu", "memory.used", "memory.total", "power.draw", "power.limit")
GPU_SECONDS, END_SECONDS = 5.0, 10.0
_log = logging.getLogger("megatron_sbn")


@contextmanager
def sampled(folder: Path, interval: float) -> Iterator[None]:
    """Samples into FOLDER/system_metrics.jsonl every `interval` seconds (0: never), at least once."""
    if not interval:
        yield
        return
    ended = threading.Event()
    arguments = (folder / SYSTEM_METRICS, interval, ended)
    thread = threading.Thread(target=_sample_until, args=arguments, name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(END_SECONDS)


def _sample_until(path: Path, interval: float, ended: threading.Event) -> None:
    """The thread."""
    machine = Machine()
    try:
        before = read_metrics(path) if path.exists() else []
        step = int(before[-1]["step"]) + 1 if before else 0
        file, first, over = MetricsFile(path), step, False
        while not over:
            began = time.monotonic()
            over = ended.wait(interval)
            # CPU use over a moment says nothing; but a short run has one sample.
            if step == first or time.monotonic() - began >= interval / 2:
                file.append(step, machine.sample())
                step += 1
        file.close()
    except (OSError, psutil.Error, InputError) as error:
        _log.warning("no more system metrics of this start: %s", error)


class Machine:
    """What is asked of this machine; CPU use is that since the last sample, or since this was made."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._gpus = which("nvidia-smi") is not None
        psutil.cpu_percent()

    def sample(self) -> dict[str, float]:
        """Metrics by name. Raises psutil.Error."""
        memory = psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "rank_0_memory_megabytes": self._process.memory_info().rss / 1e6,
        }
        return {PREFIX + name: round(value, 1) for name, value in (values | self._gpu_values()).items()}

    def _gpu_values(self) -> dict[str, float]:
        """Of the machine's GPUs, as far as nvidia-smi tells; after a failure it is not asked again."""
        if not self._gpus:
            return {}
        command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=GPU_SECONDS, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            self._gpus = False
            _log.warning("no more GPU metrics of this start: %s", error)
            return {}
        values: dict[str, float] = {}
        for row in csv.DictReader(done.stdout.splitlines(), QUERY, skipinitialspace=True):
            values |= _gpu(row)
        return values


def _gpu(row: dict[str, str]) -> dict[str, float]:
    """Metrics of one GPU; what it does not tell ("[N/A]") is left out."""
    readings = {name: float(text) for name, text in row.items() if text and text.replace(".", "", 1).isdigit()}
    values = {}
    if "utilization.gpu" in readings:
        values["utilization_percentage"] = readings["utilization.gpu"]
    if "memory.used" in readings:
        values["memory_usage_megabytes"] = readings["memory.used"] * 2**20 / 1e6
    if "power.draw" in readings:
        values["power_usage_watts"] = readings["power.draw"]
    for name, part, whole in (("memory", "memory.used", "memory.total"), ("power", "power.draw", "power.limit")):
        if part in readings and readings.get(whole):
            values[f"{name}_usage_percentage"] = 100 * readings[part] / readings[whole]
    return {f"gpu_{row['index']}_{name}": value for name, value in values.items()}
