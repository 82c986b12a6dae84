"""Forward GEMMs Y = ((X_q @ C^T) * s_x) * gamma at a shape: inputs, what comes out, and the peers of all forms."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from harness import Call, Case, Contender, Inputs, checked_rows
from sbn_kernels import dispatch, reference
from shapes import Linear, Selection
from torch import Tensor
from torch.nn.functional import linear

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Gemm:
    """[tokens, in] by an N:M weight, bf16 out."""

    layer: Linear
    tokens: int
    n: int
    m: int

    @property
    def operations(self) -> int:
        """Multiplications and additions of the dense GEMM: zeros count."""
        return 2 * self.tokens * self.layer.weights

    def case(self, kernel: str, bytes_a_weight: float = 1.0, ceiling: str = "int8", layer: str = "") -> Case:
        """Bytes at least: X_q and the weight read, Y written."""
        out, width = self.layer.out_features, self.layer.in_features
        moved = self.tokens * (width + 2 * out) + int(bytes_a_weight * self.layer.weights)
        sizes = (self.tokens, out, width, f"{self.n}:{self.m}", "bfloat16")
        return Case(kernel, layer or self.layer.name, *sizes, moved, self.operations, ceiling)

    def inputs(self, device: torch.device) -> Inputs:
        """x and w in bf16; x_q, s_x, codes and gamma [out] of them; dy bf16 [tokens, out]."""
        generator = torch.Generator(device=device).manual_seed(0)
        make = partial(torch.randn, device=device, generator=generator)
        x = make(self.tokens, self.layer.in_features).to(BF16)
        w = make(self.layer.out_features, self.layer.in_features).mul_(0.02).to(BF16)
        x_q, s_x = reference.quantize_activations(x)
        gamma = dispatch.gamma_rows(reference.weight_scales(w, self.layer.parts), self.layer.parts)
        codes, _ = reference.codes_from_gamma(w, gamma, self.n, self.m, with_mask=False)
        return {"x": x, "w": w, "x_q": x_q, "s_x": s_x, "codes": codes, "gamma": gamma}

    def scaled(self, inputs: Inputs) -> tuple[Tensor]:
        """Y by the reference, its first rows where that would be slow."""
        few = slice(0, checked_rows(self.tokens, self.operations))
        scales = (inputs["s_x"][few], inputs["codes"], inputs["gamma"])
        return (reference.ternary_linear(inputs["x_q"][few], *scales, None, BF16),)

    def integers(self, inputs: Inputs) -> tuple[Tensor]:
        """X_q @ C^T by the reference, int32."""
        few = slice(0, checked_rows(self.tokens, self.operations))
        return (reference.int_matmul(inputs["x_q"][few], inputs["codes"]).to(torch.int32),)

    def dense(self, inputs: Inputs) -> tuple[Tensor]:
        """X @ W^T in fp32, of the bf16 tensors."""
        few = slice(0, checked_rows(self.tokens, self.operations))
        return (inputs["x"][few].float() @ inputs["w"].float().t(),)


def gemms(selection: Selection, n: int, m: int, *tokens: int) -> Iterator[Gemm]:
    """The layers and token counts that were asked for, by default of 0.5B and 3B."""
    for model in selection.models_or("0.5b", "3b"):
        for layer in model.linears:
            for count in selection.tokens_or(*tokens):
                yield Gemm(layer, count, n, m)


def _bf16(inputs: Inputs) -> Call:
    return lambda: linear(inputs["x"], inputs["w"])


def _int_mm(inputs: Inputs) -> Call:
    return lambda: torch._int_mm(inputs["x_q"], inputs["codes"].t())


def _int_mm_scaled(inputs: Inputs) -> Call:
    x_q, codes, s_x, gamma = inputs["x_q"], inputs["codes"].t(), inputs["s_x"].unsqueeze(1), inputs["gamma"]
    return lambda: ((torch._int_mm(x_q, codes).float() * s_x) * gamma).to(BF16)


def bf16_linear(gemm: Gemm) -> Contender:
    """`torch.nn.functional.linear` in bf16."""
    return Contender("bf16 linear", _bf16, gemm.dense, 1e-2)


def peers_of(gemm: Gemm) -> tuple[Contender, ...]:
    """bf16, and PyTorch's int8 GEMM, without and with the scales after it."""
    return (
        bf16_linear(gemm),
        Contender("_int_mm alone", _int_mm, gemm.integers),
        Contender("_int_mm, scales", _int_mm_scaled, gemm.scaled),
    )
