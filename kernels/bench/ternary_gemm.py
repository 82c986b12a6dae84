"""Forward GEMM of int8 activations and int8 codes on tensor cores: sbn_kernels' ternary_gemm, any N:M."""

from collections.abc import Iterator
from functools import partial

from forward_gemms import BF16, gemms, peers_of
from goals import Goal, Measured
from harness import Benchmark, Call, Contender, Inputs
from sbn_kernels.gpu.gemm import ternary_gemm as ours
from shapes import Selection

DEVICE = "cuda"

INT8_PEAK = (("H200", 1979e12), ("H100 80GB HBM3", 1979e12), ("A100", 624e12))
"""Dense int8 operations a second from NVIDIA's data sheets, by what is in the device's name (H100: the SXM5 board)."""


def _ours(inputs: Inputs) -> Call:
    x_q, s_x, codes, gamma = (inputs[name] for name in ("x_q", "s_x", "codes", "gamma"))
    return lambda: ours.ternary_linear(x_q, s_x, codes, gamma, None, BF16)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """All linear layers at 6:8; the zeros cost what other codes cost."""
    for gemm in gemms(selection, 6, 8, 2048, 16384):
        contenders = (Contender("ternary_gemm", _ours, gemm.scaled, ours=True), *peers_of(gemm))
        yield Benchmark(gemm.case("ternary_gemm"), partial(gemm.inputs, selection.device), contenders)


def share_of_peak(measured: Measured, kernel: str, ours: str) -> float | None:
    """Operations a second of all 3B layers at 16,384 tokens over the data sheet's int8 peak."""
    peak = next((rate for name, rate in INT8_PEAK if name in measured.device), None)
    large = [r for r in measured.of(kernel) if r.case.layer.startswith("3b.") and r.case.tokens == 16384]
    times = [result.milliseconds(ours) for result in large]
    if peak is None or not times or None in times:
        return None
    return sum(r.case.operations for r in large) / sum(t * 1e-3 for t in times if t is not None) / peak


def goal(kernel: str, ours: str) -> Goal:
    """What every form of the dense GEMM should reach."""
    text = "3B, 16k tokens: share of int8 peak"
    return Goal(text, 0.7, lambda measured: share_of_peak(measured, kernel, ours), percent=True)


GOALS = (goal("ternary_gemm", "ternary_gemm"),)
