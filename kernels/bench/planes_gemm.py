"""Forward GEMM from codes at 2 bits, unpacked in registers: sbn_kernels' planes_gemm, any N:M."""

from collections.abc import Iterator
from functools import partial

from forward_gemms import BF16, bf16_linear, gemms
from goals import Goal
from harness import Benchmark, Call, Contender, Inputs
from sbn_kernels.formats import planes
from sbn_kernels.gpu.gemm import planes_gemm as ours
from sbn_kernels.gpu.gemm import ternary_gemm
from shapes import Selection

DEVICE = "cuda"
GOALS: tuple[Goal, ...] = ()


def _ours(inputs: Inputs) -> Call:
    packed = planes.codes_to_planes(inputs["codes"])
    x_q, s_x, gamma = inputs["x_q"], inputs["s_x"], inputs["gamma"]
    return lambda: ours.ternary_linear_planes(x_q, s_x, packed, gamma, None, BF16)


def _int8(inputs: Inputs) -> Call:
    x_q, s_x, codes, gamma = (inputs[name] for name in ("x_q", "s_x", "codes", "gamma"))
    return lambda: ternary_gemm.ternary_linear(x_q, s_x, codes, gamma, None, BF16)


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """As ternary_gemm, and at few tokens, where reading the weight is what costs."""
    for gemm in gemms(selection, 6, 8, 64, 16384):
        contenders = (
            Contender("planes", _ours, gemm.scaled, ours=True),
            Contender("ternary_gemm", _int8, gemm.scaled, ours=True),
            bf16_linear(gemm),
        )
        case = gemm.case("planes_gemm", bytes_a_weight=0.25)
        yield Benchmark(case, partial(gemm.inputs, selection.device), contenders)
