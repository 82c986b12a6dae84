"""Forward and backward of one linear layer on a micro-batch: ours in each mode, and every peer.

    ours         quantize_activations, ternary_linear, input_gradient, weight_gradient of sbn_kernels
    preparation  gamma, masks and codes of the weight: once an optimizer step, of which a micro-batch bears
                 1 / MICRO_BATCHES; the fake-quantized form prepares in every micro-batch, inside of its time

A step returns (y [tokens, out], dx [tokens, in], dw [out, in]).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import peers
import sbn_kernels as kernels
import torch
import weight_prepare
from harness import Benchmark, Call, Case, Contender, Inputs, checked_rows
from sbn_kernels import reference
from sbn_kernels.gpu import forward_forms
from shapes import Linear
from torch import Tensor
from torch.nn.functional import linear

MICRO_BATCHES = 4
"""Micro-batches of an optimizer step, over which preparing the weights is spread."""

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Error allowed of floating GEMMs, over the largest value."""

_FAKE_QUANT = {torch.float32: 2e-3, torch.bfloat16: 1e-1}
"""Of fake-quantized forms, over the 2-norm: their own rounding puts some codes elsewhere."""


@dataclass(frozen=True)
class Step:
    """One linear layer and micro-batch.

    Attributes:
        layer: the linear layer. tokens: of the micro-batch. dtype: of x, y and gradients in our contenders.
        n, m: sparsity.
    """

    layer: Linear
    tokens: int
    dtype: torch.dtype
    n: int
    m: int

    @property
    def operations(self) -> int:
        """Of one of the three GEMMs."""
        return 2 * self.tokens * self.layer.weights

    @property
    def rows(self) -> int:
        """Of results that are compared with the reference."""
        return checked_rows(1 << 62, self.operations)

    def case(self, kernel: str, ceiling: str) -> Case:
        """Forward and backward. Bytes at least: X, dY and the codes read, Y, dX and dW written."""
        out, width = self.layer.out_features, self.layer.in_features
        moved = 2 * self.tokens * (width + out) * self.dtype.itemsize + 5 * self.layer.weights
        sizes = (self.tokens, out, width, f"{self.n}:{self.m}", str(self.dtype).removeprefix("torch."))
        return Case(kernel, self.layer.name, *sizes, moved, 3 * self.operations, ceiling)

    def inputs(self, device: torch.device) -> Inputs:
        """x and dy in `dtype`, latent weights in fp32, and their codes and gamma by the reference."""
        generator = torch.Generator(device=device).manual_seed(0)
        make = partial(torch.randn, device=device, generator=generator)
        w = make(self.layer.out_features, self.layer.in_features).mul_(0.02)
        codes, gamma = self.prepared(w)
        x = make(self.tokens, self.layer.in_features).to(self.dtype)
        dy = make(self.tokens, self.layer.out_features).to(self.dtype)
        return {"x": x, "w": w, "dy": dy, "codes": codes, "gamma": gamma}

    # --- what results should be ---------------------------------------------------------------------------------

    def quantized(
        self, inputs: Inputs, mode: str, dtype: torch.dtype, latent: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """(y, dx, dw) by the reference of x and dy in `dtype`; their first rows where it would be slow.

        `latent`: the type that weights are rounded to before they are quantized; None for the codes of the inputs.
        """
        x, dy = inputs["x"].to(dtype), inputs["dy"].to(dtype)
        codes, gamma = inputs["codes"], inputs["gamma"]
        if latent is not None:
            codes, gamma = self.prepared(inputs["w"].to(latent))
        x_q, s_x = reference.quantize_activations(x)
        few = slice(0, self.rows)
        return (
            reference.ternary_linear(x_q[few], s_x[few], codes, gamma, None, dtype),
            reference.input_gradient(dy[few], codes, gamma, None, mode),
            reference.weight_gradient(dy[:, few], x_q, s_x, mode),
        )

    def dense(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """(y, dx, dw) of an ordinary linear layer, in fp32."""
        x, w, dy = (inputs[name].float() for name in ("x", "w", "dy"))
        few = slice(0, self.rows)
        return x[few] @ w.t(), dy[few] @ w, dy[:, few].t() @ x

    def prepared(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 [out, in] and gamma fp32 [out], by the reference."""
        gamma = kernels.gamma_rows(kernels.weight_scales(w, self.layer.parts), self.layer.parts)
        codes, _ = reference.codes_from_gamma(w, gamma, self.n, self.m, with_mask=False)
        return codes, gamma


def prepare_weight(w: Tensor, step: Step, form: str = "dense") -> kernels.TernaryWeight:
    """The ternary weight of a latent one as training makes it."""
    parts = step.layer.parts
    if w.is_cuda:
        (gamma,) = weight_prepare.scales([w], [parts])
    else:
        gamma = kernels.gamma_rows(kernels.weight_scales(w, parts), parts)
    bounds = [(0, *accumulate(parts))]
    weight, _ = kernels.quantize_weights([w], [gamma], step.n, step.m, bounds=bounds, forms=[form])[0]
    return weight


def _ours(step: Step, mode: str, inputs: Inputs) -> Call:
    """Our forward and backward; on CUDA in the form of the GEMM that is fastest, as "auto" chooses it."""
    x, dy, form = inputs["x"], inputs["dy"], "dense"
    if x.is_cuda:
        shape = (step.layer.out_features, step.layer.in_features)
        form = forward_forms.choose_form(step.n, step.m, *shape, step.tokens, step.dtype, x.device)
    weight = prepare_weight(inputs["w"], step, form)

    def call() -> tuple[Tensor, Tensor, Tensor]:
        x_q, s_x = kernels.quantize_activations(x)
        y = kernels.ternary_linear(x_q, s_x, weight, None, step.dtype)
        dx = kernels.input_gradient(dy, weight, mode)
        return y, dx, kernels.weight_gradient(dy, x_q, s_x, mode)

    return call


def ours(step: Step, mode: str) -> Contender:
    """Our step in a mode, with its share of the preparation: integers and int8 modes to the bit."""
    rounding = ROUNDING[step.dtype]
    dx = rounding if mode == "exact" else 0.0
    dw = 0.0 if mode == "int8" else rounding
    expected = partial(step.quantized, mode=mode, dtype=step.dtype)
    share = ("preparation", 1 / MICRO_BATCHES)
    return Contender(mode, partial(_ours, step, mode), expected, (0.0, dx, dw), ours=True, plus=share)


def preparation(step: Step) -> Contender:
    """Gamma, masks and codes of the weight."""

    def prepare(inputs: Inputs) -> Call:
        return lambda: prepare_weight(inputs["w"], step)

    def expected(inputs: Inputs) -> tuple[Tensor, Tensor]:
        return inputs["codes"], inputs["gamma"]

    def view(weight: kernels.TernaryWeight) -> tuple[Tensor, Tensor]:
        return weight.codes, weight.gamma_per_row

    return Contender("preparation", prepare, expected, ours=True, raw=True, view=view)


def _cast(function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, inputs: Inputs) -> Call:
    x, w, dy = (inputs[name].to(dtype) for name in ("x", "w", "dy"))
    return peers.training_step(function, x, w, dy)


def dense(step: Step, dtype: torch.dtype) -> Contender:
    """`torch.nn.functional.linear` in a type."""
    name = str(dtype).removeprefix("torch.")
    return Contender(f"dense {name}", partial(_cast, linear, dtype), step.dense, 1e-2)


def fake_quant(step: Step, dtype: torch.dtype) -> Contender:
    """The fake-quantized form in a type, weights in that type as well."""
    function = partial(peers.fake_quant_linear, parts=step.layer.parts, n=step.n, m=step.m)
    expected = partial(step.quantized, mode="exact", dtype=dtype, latent=dtype)
    name = str(dtype).removeprefix("torch.")
    return Contender(f"fake-quant {name}", partial(_cast, function, dtype), expected, _FAKE_QUANT[dtype])


def torchao(step: Step) -> Contender:
    """torchao's BitNet linear: no N:M, and one scale for all rows, whatever the parts."""
    layer = Linear(step.layer.name, step.layer.in_features, (step.layer.out_features,))
    whole = Step(layer, step.tokens, step.dtype, 1, 1)

    def prepare(inputs: Inputs) -> Call:
        return peers.torchao_step(inputs["x"], inputs["w"].to(step.dtype), inputs["dy"])

    expected = partial(whole.quantized, mode="exact", dtype=step.dtype, latent=step.dtype)
    return Contender("torchao BitNet", prepare, expected, _FAKE_QUANT[torch.bfloat16])


def benchmark(
    step: Step, kernel: str, ceiling: str, device: torch.device, contenders: tuple[Contender, ...], seconds: float
) -> Benchmark:
    """A step's benchmark; the preparation goes with every list of contenders."""
    inputs = partial(step.inputs, device)
    return Benchmark(step.case(kernel, ceiling), inputs, (*contenders, preparation(step)), seconds)
