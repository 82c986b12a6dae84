"""The whole linear layer on CPU, forward and backward of 2,048 tokens: ours in two modes against dense and fake-quant.

The best that the arithmetic allows, from raw GEMMs timed in the same run at the same shapes (raw_gemms):

    exact        forward by the fastest exact integer GEMM + fp32 dgrad + fp32 wgrad
    int8_dgrad   the same with dgrad by the fastest exact integer GEMM

and the share of it that ours reaches, with its part of the preparation, is `predicted / ours`.
"""

from collections.abc import Iterator

import raw_gemms
import torch
from goals import Goal, Measured, geometric_mean, mean_ratio
from harness import Benchmark, Result
from linear_steps import Step, benchmark, dense, fake_quant, ours
from shapes import Linear, Selection

DEVICE = "cpu"
TOKENS = 2048
SHAPES = (Linear("0.5b.gate", 896, (4864,)), Linear("0.5b.down", 4864, (896,)))
"""What the goals are about: the feed-forward of 0.5B, one of gate and up."""


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """The two shapes, or all layers of the models that are named, at 6:8."""
    layers: tuple[Linear, ...] = SHAPES
    if selection.models is not None:
        layers = tuple(layer for model in selection.models for layer in model.linears)
    fp32, bf16 = torch.float32, torch.bfloat16
    for layer in layers:
        for tokens in selection.tokens_or(TOKENS):
            step = Step(layer, tokens, fp32, 6, 8)
            contenders = (
                *(ours(step, mode) for mode in ("exact", "int8_dgrad")),
                *(dense(step, dtype) for dtype in (fp32, bf16)),
                *(fake_quant(step, dtype) for dtype in (fp32, bf16)),
                *raw_gemms.contenders(),
            )
            yield benchmark(step, "cpu_linear", "fp32", selection.device, contenders, 45.0)


def predicted(result: Result, mode: str) -> float | None:
    """Milliseconds that raw GEMMs alone would take; None if one was not measured."""

    def fastest(side: str) -> float | None:
        times = [result.milliseconds(f"raw {side} {form}") for form in raw_gemms.INTEGER_FORMS]
        return min((time for time in times if time is not None), default=None)

    dgrad = fastest("dgrad") if mode == "int8_dgrad" else result.milliseconds("raw dgrad fp32")
    parts = (fastest("forward"), dgrad, result.milliseconds("raw wgrad fp32"))
    return None if None in parts else sum(part for part in parts if part is not None)


def _of(measured: Measured) -> list[Result]:
    names = [layer.name for layer in SHAPES]
    results = [r for r in measured.of("cpu_linear") if r.case.layer in names and r.case.tokens == TOKENS]
    return results if len(results) == len(SHAPES) else []


def _share(mode: str) -> Goal:
    def value(measured: Measured) -> float | None:
        shares = []
        for result in _of(measured):
            best, time = predicted(result, mode), result.milliseconds(mode)
            shares.append(None if best is None or time is None else best / time)
        return geometric_mean(shares)

    return Goal(f"{mode}: share of what the arithmetic allows", 0.9, value, percent=True)


def _gain(mode: str, peer: str, wanted: float) -> Goal:
    return Goal(f"{mode} over {peer}", wanted, lambda measured: mean_ratio(_of(measured), mode, peer))


GOALS = (
    _gain("exact", "dense float32", 1.2),
    _gain("exact", "dense bfloat16", 1.5),
    _gain("int8_dgrad", "dense float32", 1.6),
    _gain("int8_dgrad", "dense bfloat16", 2.0),
    _gain("exact", "fake-quant float32", 2.0),
    _gain("exact", "fake-quant bfloat16", 2.0),
    _share("exact"),
    _share("int8_dgrad"),
)
