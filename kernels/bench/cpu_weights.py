"""Masks and codes on CPU without sorting: sbn_kernels' weights against argsort + scatter, same bits.

Bytes at least: 4 read, and 1 + 1 written for codes and mask.
"""

from collections.abc import Iterator
from functools import partial

import peers
import sbn_kernels as kernels
import torch
from goals import Goal, Measured, total_ratio
from harness import Benchmark, Call, Case, Contender, Inputs
from sbn_kernels import reference
from sbn_kernels.cpu import weights as ours
from shapes import Selection
from torch import Tensor

DEVICE = "cpu"
N, M = 6, 8
HEADLINE = (4864, 896)
"""Rows and columns of the weight that the goal is about: half of 0.5B's gate_up."""


def _inputs(out: int, width: int) -> Inputs:
    w = torch.randn(out, width, generator=torch.Generator().manual_seed(0)) * 0.02
    return {"w": w, "gamma": kernels.gamma_rows(reference.weight_scales(w), (out,))}


def _network(inputs: Inputs) -> Call:
    return lambda: ours.codes_from_gamma(inputs["w"], inputs["gamma"], N, M)


def _counting(inputs: Inputs) -> Call:
    return lambda: reference.codes_from_gamma(inputs["w"], inputs["gamma"], N, M)


def _sorting(inputs: Inputs) -> Call:
    return lambda: peers.argsort_codes(inputs["w"], inputs["gamma"], N, M)


def _expected(inputs: Inputs) -> tuple[Tensor, Tensor]:
    codes, mask = reference.codes_from_gamma(inputs["w"], inputs["gamma"], N, M)
    assert mask is not None
    return codes, mask


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """One weight of 4.36 million, or all of the models that are named."""
    shapes = {"gate": HEADLINE}
    if selection.models is not None:
        layers = [layer for model in selection.models for layer in model.linears]
        shapes = {layer.name: (layer.out_features, layer.in_features) for layer in layers}
    for name, (out, width) in shapes.items():
        contenders = (
            Contender("selection network", _network, _expected, ours=True),
            Contender("argsort + scatter", _sorting, _expected),
            Contender("counting ranks", _counting, _expected),
        )
        case = Case("cpu_weights", name, 0, out, width, f"{N}:{M}", "float32", 6 * out * width, 0, "copy")
        yield Benchmark(case, partial(_inputs, out, width), contenders)


def _ratio(measured: Measured) -> float | None:
    results = [r for r in measured.of("cpu_weights") if (r.case.out_features, r.case.in_features) == HEADLINE]
    return total_ratio(results, "selection network", "argsort + scatter")


GOALS = (Goal("masks and codes over argsort + scatter", 5.0, _ratio),)
