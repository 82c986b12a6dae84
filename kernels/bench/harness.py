"""How a benchmark is run: contenders checked, then timed in turns on data that is not in cache.

A `Benchmark` is one `Case` (a kernel at a shape) and its contenders, ours and peers. `measure` does, for each of them:

    check     its result on the real inputs against what it should be: integers exactly, floats within a tolerance
    warm up   compilation, tuning and the libraries' own caches
    time      A B C, B C A, C A B, ...: ratios are of medians from the same minute

Between two calls of a contender its inputs rotate through enough copies to exceed the last-level cache twice. On CUDA
the cache is overwritten before each call as well, for as long as the call takes to enqueue, so that events bracket the
GPU's work and not Python's; the time to enqueue is kept beside it. On CPU the clock is `time.perf_counter`, and a peer
whose first call takes more than 10 seconds (bf16 without bf16 instructions does) is timed by that call alone.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

Call = Callable[[], Any]
"""A timed call; what it returns is checked."""

Inputs = Mapping[str, Tensor]
"""Tensors that all contenders of a case share, by name."""

_FALLBACK_CACHE = 32 << 20
_MOST_COPIES = 256
_CHECKED_ROWS = 64
_PATIENCE = 10e3
_CHECKED_OPERATIONS = 1 << 36
_SAMPLES = MappingProxyType({"cpu": (5, 40), "cuda": (10, 200)})
_SECONDS = MappingProxyType({"cpu": 5.0, "cuda": 1.0})


class UnavailableError(Exception):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """A kernel at a shape, and the least work that it stands for.

    Attributes:
        kernel: name of the file in this folder.
        layer: of `shapes`, or what else is measured.
        tokens, out_features, in_features: of the GEMM, or of the tensor that is worked on.
        sparsity: "6:8"; "" where there is none.
        dtype: of activations, outputs and gradients.
        bytes_moved: least bytes read and written.
        operations: multiplications and additions; 0 for what is bound by memory.
        ceiling: of `ceilings.CEILINGS`: what the share is a share of.
    """

    kernel: str
    layer: str
    tokens: int
    out_features: int
    in_features: int
    sparsity: str
    dtype: str
    bytes_moved: int
    operations: int
    ceiling: str

    @property
    def shape(self) -> str:
        """For people: "3b.down 2048x2048x11008 6:8 bf16" (tokens x out x in)."""
        sizes = "x".join(str(size) for size in (self.tokens, self.out_features, self.in_features) if size)
        return " ".join(filter(None, (self.layer, sizes, self.sparsity, self.dtype)))


@dataclass(frozen=True)
class Contender:
    """One way to do what a case asks for.

    Attributes:
        name: in tables.
        prepare: one copy of the inputs -> the call to time; raises `UnavailableError` if it cannot run here.
        expected: inputs -> the tensors that `view` of its result has to give, or their first rows.
        tolerance: 0: equal bits. Else the largest error over the largest value (ours), or the 2-norm of the error over
            that of the values (peers, which may round a code the other way now and then). One for each tensor, or all.
        ours: whether it is of sbn_kernels; the first one that is stands for us in ratios.
        view: result -> tensors to compare.
        plus: (contender, weight): added to each of its times is so much of the other's median.
        raw: it does a part of the case's work, and is timed to know what the whole is made of: no rate or share of the
            case goes with its time, and it stands neither for us nor for a peer.
    """

    name: str
    prepare: Callable[[Inputs], Call]
    expected: Callable[[Inputs], Sequence[Tensor]]
    tolerance: float | tuple[float, ...] = 0.0
    ours: bool = False
    view: Callable[[Any], Sequence[Tensor]] | None = None
    plus: tuple[str, float] | None = None
    raw: bool = False

    @property
    def role(self) -> str:
        """What a row of it is: "ours", "raw" or "peer"."""
        return "raw" if self.raw else "ours" if self.ours else "peer"


@dataclass(frozen=True)
class Benchmark:
    """A case with its inputs and contenders; `seconds` of timing, None for the device's default."""

    case: Case
    make_inputs: Callable[[], Inputs]
    contenders: Sequence[Contender]
    seconds: float | None = None


@dataclass(frozen=True)
class Measurement:
    """Times of one contender in milliseconds; `enqueue` is CUDA's time to launch, 0 on CPU; role: ours, peer, raw."""

    samples: tuple[float, ...]
    enqueue: float
    role: str

    def percentile(self, percent: int) -> float:
        """20, 50 or 80 percent of the samples are at most this, interpolated."""
        if percent == 50 or len(self.samples) == 1:
            return statistics.median(self.samples)
        return statistics.quantiles(self.samples, n=5, method="inclusive")[percent // 20 - 1]

    @property
    def median(self) -> float:
        """Milliseconds."""
        return self.percentile(50)


@dataclass(frozen=True)
class Result:
    """What became of a benchmark's contenders, by name.

    Attributes:
        measured: those that ran.
        absent: why one could not run here.
        wrong: what is the matter with one whose result is not what it should be, or with one of ours that failed.
    """

    case: Case
    measured: Mapping[str, Measurement] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    wrong: Mapping[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> str | None:
        """The contender that stands for us."""
        return next((name for name, m in self.measured.items() if m.role == "ours"), None)

    @property
    def best_peer(self) -> str | None:
        """The fastest contender that is not ours."""
        peers = {name: m.median for name, m in self.measured.items() if m.role == "peer"}
        return min(peers, key=peers.__getitem__) if peers else None

    def milliseconds(self, name: str) -> float | None:
        """Median of a contender; None if it did not run."""
        return self.measured[name].median if name in self.measured else None


def checked_rows(rows: int, operations: int) -> int:
    """How many of the result's rows are compared: all of them, or 64 where the reference would take long."""
    return rows if operations <= _CHECKED_OPERATIONS else min(rows, _CHECKED_ROWS)


def difference(
    actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float | tuple[float, ...], largest: bool = True
) -> str | None:
    """Return how `actual` (its first rows) differs from `expected` by more than allowed; None if it does not.

    `largest`: tolerances are of the largest values, else of 2-norms.
    """
    if len(actual) != len(expected):
        return f"{len(actual)} tensors in place of {len(expected)}"
    allowed = tolerance if isinstance(tolerance, tuple) else (tolerance,) * len(expected)
    for index, (found, wanted, limit) in enumerate(zip(actual, expected, allowed, strict=True)):
        got = found[: len(wanted)] if wanted.dim() else found
        if got.shape != wanted.shape:
            return f"tensor {index} has shape {tuple(got.shape)} in place of {tuple(wanted.shape)}"
        if limit == 0.0:
            unlike = int((got != wanted).sum()) if got.dtype == wanted.dtype else wanted.numel()
            if unlike:
                return f"tensor {index}: {unlike} of {wanted.numel()} values differ from the reference ({got.dtype})"
            continue
        order = math.inf if largest else 2.0
        error = torch.linalg.vector_norm(got.float() - wanted.float(), order)
        size = torch.linalg.vector_norm(wanted.float(), order)
        if not bool(error <= limit * size):
            return f"tensor {index}: error {float(error / size):.2e} of its size, {limit:.0e} allowed"
    return None


@lru_cache(maxsize=8)
def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache: L2 of a GPU, the largest cache of CPU 0."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    scale = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * scale[size[-1]] for size in sizes if size[-1:] in scale), default=_FALLBACK_CACHE)


def copies_needed(bytes_moved: int, cache: int) -> int:
    """How many copies of what a call touches are twice the cache: at least 2, at most 256."""
    return min(max(2, math.ceil(2 * cache / max(bytes_moved, 1))), _MOST_COPIES)


class _Clock:
    """Milliseconds of a call (and of enqueueing it) on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if self.cuda:
            size = max(2 * cache_bytes(device), 1 << 26)
            self.scratch = torch.empty(size, dtype=torch.int8, device=device)
            self.scratch.zero_()
            self.sweep = min(self._events(self.scratch.zero_)[0] for _ in range(5))

    def _events(self, call: Call) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        before = time.perf_counter()
        call()
        enqueue = (time.perf_counter() - before) * 1e3
        end.record()
        end.synchronize()
        return start.elapsed_time(end), enqueue

    def time(self, call: Call, enqueue: float = 0.0) -> tuple[float, float]:
        """(milliseconds, of which to enqueue) of one call, with the GPU kept busy for 1.5 times `enqueue` before."""
        if not self.cuda:
            before = time.perf_counter()
            call()
            return (time.perf_counter() - before) * 1e3, 0.0
        for _ in range(1 + min(math.ceil(1.5 * enqueue / self.sweep), 500)):
            self.scratch.zero_()
        return self._events(call)


@dataclass(frozen=True)
class _Runner:
    """A contender that is ready: one call per copy of the inputs (none: it was timed already), and what one takes."""

    contender: Contender
    calls: Sequence[Call]
    estimate: float
    enqueue: float


def check(
    contender: Contender, inputs: Inputs, references: dict[Any, Sequence[Tensor]]
) -> tuple[Call, float, str | None]:
    """Return a contender's call, milliseconds of the first one (CPU), and what is wrong with its result.

    `references` keeps what was expected, for contenders that share it.

    Raises:
        UnavailableError: it cannot run here.
    """
    call = contender.prepare(inputs)
    before = time.perf_counter()
    result = call()
    first = (time.perf_counter() - before) * 1e3
    view = contender.view or (lambda value: value if isinstance(value, tuple | list) else (value,))
    if contender.expected not in references:
        references[contender.expected] = contender.expected(inputs)
    expected, largest = references[contender.expected], contender.role != "peer"
    return call, first, difference(view(result), expected, contender.tolerance, largest)


def _make_ready(
    benchmark: Benchmark, device: torch.device, absent: dict[str, str], wrong: dict[str, str]
) -> Iterator[_Runner]:
    """Checked and warmed-up contenders; notes why the others are not among them."""
    inputs = benchmark.make_inputs()
    count = copies_needed(benchmark.case.bytes_moved, cache_bytes(device))
    copies = [inputs] + [{name: tensor.clone() for name, tensor in inputs.items()} for _ in range(count - 1)]
    clock = _Clock(device)
    references: dict[Any, Sequence[Tensor]] = {}
    for contender in benchmark.contenders:
        try:
            call, first, complaint = check(contender, inputs, references)
            if complaint is not None:
                wrong[contender.name] = complaint
                continue
            if first > _PATIENCE and contender.role == "peer" and device.type == "cpu":
                yield _Runner(contender, (), first, 0.0)
                continue
            calls = [call, *(contender.prepare(copy) for copy in copies[1:])]
            calls[-1]()
            first, enqueue = clock.time(calls[0])
            second, enqueue = clock.time(calls[-1], enqueue)
        except (UnavailableError, torch.OutOfMemoryError) as error:
            absent[contender.name] = _first_line(error)
        except (ImportError, RuntimeError, ValueError, TypeError, AssertionError, TritonError) as error:
            # A peer may refuse a shape or a machine; we may only say so in advance.
            (wrong if contender.ours else absent)[contender.name] = f"{type(error).__name__}: {_first_line(error)}"
        else:
            yield _Runner(contender, calls, min(first, second), enqueue)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def sample_counts(estimates: Sequence[float], seconds: float, least: int, most: int) -> list[int]:
    """How often each contender is timed so that all take about equal parts of `seconds`, given milliseconds a call."""
    part = seconds * 1e3 / max(len(estimates), 1)
    return [min(max(int(part / max(estimate, 1e-6)), least), most) for estimate in estimates]


def turns(counts: Sequence[int]) -> Iterator[int]:
    """Indices of contenders in the order of timing: rounds in which each takes part evenly, begun by another each."""
    rounds = max(counts, default=0)
    for number in range(rounds):
        for place in range(len(counts)):
            index = (place + number) % len(counts)
            if (number + 1) * counts[index] // rounds > number * counts[index] // rounds:
                yield index


def measure(benchmark: Benchmark, device: torch.device) -> Result:
    """Check and time the contenders of a benchmark (see the module)."""
    absent: dict[str, str] = {}
    wrong: dict[str, str] = {}
    runners = list(_make_ready(benchmark, device, absent, wrong))
    least, most = _SAMPLES[device.type]
    seconds = benchmark.seconds or _SECONDS[device.type]
    estimates = [runner.estimate for runner in runners]
    counts = sample_counts(estimates, seconds, least, most)
    counts = [count if runner.calls else 0 for count, runner in zip(counts, runners, strict=True)]
    clock = _Clock(device)
    times: list[list[tuple[float, float]]] = [[] if runner.calls else [(runner.estimate, 0.0)] for runner in runners]
    for index in turns(counts):
        runner = runners[index]
        call = runner.calls[len(times[index]) % len(runner.calls)]
        times[index].append(clock.time(call, runner.enqueue))
    measured = {
        runner.contender.name: Measurement(
            tuple(total for total, _ in samples),
            statistics.median(enqueue for _, enqueue in samples),
            runner.contender.role,
        )
        for runner, samples in zip(runners, times, strict=True)
    }
    return Result(benchmark.case, _with_additions(runners, measured, absent), absent, wrong)


def _with_additions(
    runners: Sequence[_Runner], measured: Mapping[str, Measurement], absent: dict[str, str]
) -> dict[str, Measurement]:
    """Measurements with what `Contender.plus` adds; without the other there is none of this one either."""
    complete = {}
    for runner in runners:
        own = measured[runner.contender.name]
        if runner.contender.plus is None:
            complete[runner.contender.name] = own
        elif runner.contender.plus[0] in measured:
            other, weight = runner.contender.plus
            extra = weight * measured[other].median
            complete[runner.contender.name] = Measurement(tuple(t + extra for t in own.samples), own.enqueue, own.role)
        else:
            absent[runner.contender.name] = f"{runner.contender.plus[0]!r}, a part of it, was not measured"
    return complete
