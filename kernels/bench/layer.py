"""All linear layers of a transformer layer on CUDA, forward and backward, in each mode: what training gains.

Every mode bears a quarter of the weights' preparation (`linear_steps.MICRO_BATCHES`). Goals add up the four layers.
"""

from collections.abc import Iterator

import torch
from goals import Goal, Measured, total_ratio
from harness import Benchmark, Result
from linear_steps import Step, benchmark, dense, fake_quant, ours, torchao
from shapes import Selection

DEVICE = "cuda"


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """The four layers of each model, at 6:8 in bf16."""
    bf16 = torch.bfloat16
    for model in selection.models_or("3b", "0.5b"):
        for tokens in selection.tokens_or(16384):
            for layer in model.linears:
                step = Step(layer, tokens, bf16, 6, 8)
                modes = tuple(ours(step, mode) for mode in ("exact", "int8_dgrad", "int8"))
                contenders = (*modes, dense(step, bf16), fake_quant(step, bf16), torchao(step))
                yield benchmark(step, "layer", "bf16", selection.device, contenders, 1.5)


def _of(measured: Measured, model: str) -> list[Result]:
    """The results of a model's four layers at 16,384 tokens; none unless all are there."""
    results = [r for r in measured.of("layer") if r.case.layer.startswith(f"{model}.") and r.case.tokens == 16384]
    return results if len(results) == 4 else []


def _gain(model: str, mode: str, peer: str, wanted: float) -> Goal:
    def value(measured: Measured) -> float | None:
        return total_ratio(_of(measured, model), mode, peer)

    return Goal(f"{model} {mode} over {peer}", wanted, value)


GOALS = (
    _gain("3b", "exact", "dense bfloat16", 1.16),
    _gain("3b", "int8_dgrad", "dense bfloat16", 1.37),
    _gain("3b", "int8", "dense bfloat16", 1.6),
    _gain("0.5b", "exact", "dense bfloat16", 1.0),
    _gain("3b", "exact", "torchao BitNet", 1.15),
    _gain("3b", "exact", "fake-quant bfloat16", 2.0),
)
