"""The command: measures kernels and peers, appends rows to results.csv, prints a table with goals last.

Runs from a checkout that has only PyTorch and Triton. docs/benchmarks.md says how to read what it writes.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ceilings
import torch
from goals import Measured, table
from harness import Benchmark, Result, measure
from records import RESULTS, Environment, append, environment, rows
from shapes import MODELS, MOST_TOKENS, Selection

KERNELS = (
    *("cpu_weights", "cpu_linear"),
    *("activation_quantize", "weight_prepare", "ternary_gemm", "layer", "decode"),
    *("rms_norm_quantize", "swiglu_quantize", "ternary_dgrad", "ternary_wgrad", "gradient_quantize"),
    *("planes_gemm", "cross_entropy", "cusparselt", "sliding_window", "sparse_gemm", "wgmma_gemm"),
)
"""Files of this folder: those with goals first, those whose kernels have never run on hardware last."""

BUDGET = {"cpu": 280.0, "cuda": 520.0}
"""Seconds after which no case is started, by device."""

EPILOG = """example:
  python kernels/bench/run.py --kernels ternary_gemm decode --models 3b --tokens 8 2048 --no-record

Exit status: 0 measured, 1 a result was wrong or a kernel of ours failed, 2 bad arguments."""


@dataclass
class Run:
    """What a run has done so far.

    Attributes:
        environment: machine and versions.
        record: whether rows are appended to results.csv.
        deadline: `time.monotonic()` after which no case is started.
        results, ceilings: measured.
        reasons: kernel -> why it was not, or not all of it.
        failures: lines about wrong results.
    """

    environment: Environment
    record: bool
    deadline: float
    results: list[Result] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def measure(self, benchmark: Benchmark, device: torch.device) -> Result | None:
        """Run one benchmark, report it and keep its rows; None if its inputs do not fit the device."""
        say(f"{benchmark.case.kernel}: {benchmark.case.shape}")
        try:
            result = measure(benchmark, device)
        except torch.OutOfMemoryError as error:
            say(f"  not measured: {str(error).splitlines()[0]}")
            return None
        for name, reason in result.absent.items():
            say(f"  {name}: not measured: {reason}")
        for name, complaint in result.wrong.items():
            self.failures.append(f"{benchmark.case.kernel} {benchmark.case.shape}, {name}: {complaint}")
            say(f"  {name}: WRONG: {complaint}")
        for name, measured in result.measured.items():
            say(f"  {name}: {measured.median:.3f} ms, {len(measured.samples)} samples")
        if self.record:
            append(RESULTS, list(rows(result, self.environment, self.ceilings)))
        return result


def say(text: str) -> None:
    """Progress goes to stderr, so that stdout is the table."""
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake ends the process with status 2."""
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, metavar="NAME", help=f"of: {', '.join(KERNELS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is one")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), help="all linear layers of these Qwen2.5 models")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help=f"token counts, 1 to {MOST_TOKENS}")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=f"start no case later than this; {BUDGET}")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch on CPU; its own choice if left out")
    parser.add_argument("--no-record", action="store_true", help="leave results.csv as it is")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device; leave --device out, or name cpu")
    if options.tokens and not all(1 <= count <= MOST_TOKENS for count in options.tokens):
        parser.error(f"--tokens {options.tokens}: each from 1 to {MOST_TOKENS}")
    return options


def measure_ceilings(run: Run, device: torch.device) -> None:
    """Fill the run's ceilings, in operations or bytes a second, within the budget."""
    for benchmark in ceilings.benchmarks(device):
        if time.monotonic() > run.deadline:
            say(f"ceilings: {benchmark.case.layer}: not measured: budget")
            continue
        result = run.measure(benchmark, device)
        time_taken = result.milliseconds("torch") if result else None
        if time_taken:
            case = benchmark.case
            run.ceilings[case.layer] = (case.operations or case.bytes_moved) / (time_taken * 1e-3)
    if "bf16" in run.ceilings:
        run.ceilings["int8"] = 2 * run.ceilings["bf16"]


def measure_kernel(run: Run, name: str, module: ModuleType, selection: Selection) -> None:
    """All benchmarks of a kernel, until the budget is spent."""
    if selection.device.type != module.DEVICE:
        run.reasons[name] = "no CUDA device" if module.DEVICE == "cuda" else "runs on CPU, name --device cpu"
        return
    left_out = 0
    for benchmark in module.benchmarks(selection):
        if time.monotonic() > run.deadline:
            left_out += 1
            say(f"{name}: {benchmark.case.shape}: not measured: budget")
            continue
        result = run.measure(benchmark, selection.device)
        if result is not None:
            run.results.append(result)
        if selection.device.type == "cuda":
            torch.cuda.empty_cache()
    if left_out:
        run.reasons[name] = "budget"


def finish(run: Run, modules: Callable[[], Iterator[tuple[str, ModuleType]]]) -> int:
    """Print the table, and what was wrong; the exit status."""
    measured = Measured(run.results, run.ceilings, run.environment.device)
    where = run.environment
    print(f"\n{where.device}; torch {where.torch}, triton {where.triton}, commit {where.commit or 'unknown'}")
    for line in table({name: module.GOALS for name, module in modules()}, measured, run.reasons):
        print(line)
    for failure in run.failures:
        print(f"WRONG: {failure}")
    return 1 if run.failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; the exit status."""
    options = parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.threads:
        torch.set_num_threads(options.threads)
    names = options.kernels or KERNELS

    def modules() -> Iterator[tuple[str, ModuleType]]:
        return ((name, importlib.import_module(name)) for name in names)

    budget = BUDGET[device.type] if options.budget is None else options.budget
    run = Run(environment(device), not options.no_record, time.monotonic() + budget)
    models = tuple(MODELS[name] for name in options.models) if options.models else None
    selection = Selection(device, models, tuple(options.tokens) if options.tokens else None)
    if any(device.type == module.DEVICE for _, module in modules()):
        measure_ceilings(run, device)
    for name, module in modules():
        measure_kernel(run, name, module, selection)
    return finish(run, modules)


if __name__ == "__main__":
    sys.exit(main())
