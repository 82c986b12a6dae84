"""Gamma, masks and codes of all weights of a transformer layer on CUDA, in three launches.

Bytes at least, for each fp32 weight: 4 + 4 to find the scales (a maximum, then a sum in its unit), 4 + 1 + 1 to read it
and write its codes twice, as the forward and the input gradient want them.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import peers
import sbn_kernels as kernels
import torch
from goals import Goal, Measured, least_share
from harness import Benchmark, Call, Case, Contender, Inputs
from sbn_kernels import exact_sum, reference
from sbn_kernels.formats.planes import codes_to_planes
from sbn_kernels.gpu.weights import weight_prepare as fast
from sbn_kernels.gpu.weights import weight_sums
from shapes import Linear, Model, Selection
from torch import Tensor

DEVICE = "cuda"
N, M = 6, 8


def scales(weights: Sequence[Tensor], parts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Gamma of every row of every weight, fp32 [out] each, by two launches."""
    ranges = [[part] for w, sizes in zip(weights, parts, strict=True) for part in w.split(list(sizes))]
    counts = torch.tensor([part[0].numel() for part in ranges], device=weights[0].device)
    unit = exact_sum.unit_exponent(weight_sums.abs_maxima(ranges), counts)
    gammas = exact_sum.gamma_from_fixed_point(weight_sums.fixed_point_sums(ranges, unit), unit, counts)
    per_weight = gammas.split([len(sizes) for sizes in parts])
    return [kernels.gamma_rows(gamma, sizes) for gamma, sizes in zip(per_weight, parts, strict=True)]


def _inputs(layers: Sequence[Linear], device: torch.device) -> Inputs:
    generator = torch.Generator(device=device).manual_seed(0)
    shapes = {layer.name: (layer.out_features, layer.in_features) for layer in layers}
    return {name: torch.randn(shape, device=device, generator=generator) * 0.02 for name, shape in shapes.items()}


def _gammas(layers: Sequence[Linear], inputs: Inputs) -> list[Tensor]:
    return [kernels.gamma_rows(reference.weight_scales(inputs[x.name], x.parts), x.parts) for x in layers]


def _codes(layers: Sequence[Linear], inputs: Inputs) -> list[Tensor]:
    weights = [inputs[layer.name] for layer in layers]
    gammas = _gammas(layers, inputs)
    return [reference.codes_from_gamma(w, gamma, N, M)[0] for w, gamma in zip(weights, gammas, strict=True)]


def _prepare_scales(layers: Sequence[Linear], inputs: Inputs) -> Call:
    return lambda: scales([inputs[layer.name] for layer in layers], [layer.parts for layer in layers])


def _prepare_codes(layers: Sequence[Linear], transpose: bool, planes: bool, inputs: Inputs) -> Call:
    weights, gammas = [inputs[layer.name] for layer in layers], _gammas(layers, inputs)
    wanted = [planes] * len(weights)
    return lambda: fast.codes_of_many(weights, gammas, N, M, transpose=transpose, planes=wanted).codes


def _prepare_then_pack(layers: Sequence[Linear], inputs: Inputs) -> Call:
    prepare_codes = _prepare_codes(layers, True, False, inputs)

    def call() -> list[Tensor]:
        made = prepare_codes()
        for codes in made:
            codes_to_planes(codes)
        return made

    return call


def _sort_codes(layers: Sequence[Linear], inputs: Inputs) -> Call:
    weights, gammas = [inputs[layer.name] for layer in layers], _gammas(layers, inputs)
    return lambda: [peers.argsort_codes(w, g, N, M)[0] for w, g in zip(weights, gammas, strict=True)]


def _reference_scales(layers: Sequence[Linear], inputs: Inputs) -> Call:
    return lambda: _gammas(layers, inputs)


def _case(model: Model, what: str, bytes_a_weight: int) -> Case:
    weights = sum(layer.weights for layer in model.linears)
    return Case(
        *("weight_prepare", f"{model.name} layer {what}", 0, weights, 0, f"{N}:{M}", "float32"),
        *(bytes_a_weight * weights, 0, "copy"),
    )


def _scale_contenders(layers: Sequence[Linear]) -> tuple[Contender, ...]:
    expected = partial(_gammas, layers)
    return (
        Contender("scales", partial(_prepare_scales, layers), expected, ours=True),
        Contender("PyTorch, exact too", partial(_reference_scales, layers), expected),
    )


def _code_contenders(layers: Sequence[Linear]) -> tuple[Contender, ...]:
    expected = partial(_codes, layers)
    return (
        Contender("codes twice", partial(_prepare_codes, layers, True, False), expected, ours=True),
        Contender("codes once", partial(_prepare_codes, layers, False, False), expected, ours=True),
        Contender("codes twice, planes", partial(_prepare_codes, layers, True, True), expected, ours=True),
        Contender("codes twice, then planes", partial(_prepare_then_pack, layers), expected, ours=True),
        Contender("argsort + scatter", partial(_sort_codes, layers), expected),
    )


def benchmarks(selection: Selection) -> Iterator[Benchmark]:
    """Scales, and masks with codes, of one transformer layer; 3B, as small layers are bound by launches."""
    for model in selection.models_or("3b"):
        inputs = partial(_inputs, model.linears, selection.device)
        yield Benchmark(_case(model, "scales", 8), inputs, _scale_contenders(model.linears))
        yield Benchmark(_case(model, "codes", 6), inputs, _code_contenders(model.linears))


def _share(measured: Measured) -> float | None:
    shares = [
        least_share((result,), name, measured.ceilings)
        for result in measured.of("weight_prepare")
        for name in ("scales", "codes twice")
        if name in result.measured
    ]
    known = [share for share in shares if share is not None]
    return min(known) if known and len(known) == len(shares) else None


GOALS = (Goal("scales and codes: share of copy bandwidth", 0.8, _share, percent=True),)
