"""Bare GEMMs on CPU at a layer's shapes: the parts that no implementation of the layer can go below.

    forward   X_q @ C^T in each exact form of sbn_kernels' linear (onednn, int_mm, float)
    dgrad     dY @ W in fp32, and G_q @ C in each exact form
    wgrad     dY^T @ X in fp32

Operands are converted and packed before the clock starts. A form that is far slower than another on few tokens (int_mm
without VNNI is, by 50 times) is left out: it cannot be the fastest.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from harness import Call, Contender, Inputs, UnavailableError
from linear_steps import ROUNDING
from sbn_kernels import reference
from torch import Tensor

_FEW = 64
_TOO_SLOW = 3.0


def _onednn(x_q: Tensor, codes: Tensor) -> Call:
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    shifted = x_q.view(torch.uint8) ^ 128
    scales: tuple[Any, ...] = (1.0, 128, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return lambda: torch.ops.onednn.qlinear_pointwise(shifted, *scales)


def _int_mm(x_q: Tensor, codes: Tensor) -> Call:
    return lambda: torch._int_mm(x_q, codes.t())


def _float(x_q: Tensor, codes: Tensor) -> Call:
    left, right = x_q.float(), codes.float().t()
    return lambda: left @ right


INTEGER_FORMS: Mapping[str, Callable[[Tensor, Tensor], Call]] = MappingProxyType(
    {"onednn": _onednn, "int_mm": _int_mm, "float": _float}
)
"""Name -> (x_q int8 [tokens, k], codes int8 [rows, k]) -> a call that gives x_q @ codes^T exactly."""


def _milliseconds(call: Call) -> float:
    call()
    before = time.perf_counter()
    call()
    return (time.perf_counter() - before) * 1e3


def _operands(side: str, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Int8 operands of the forward GEMM, or of the int8 input gradient."""
    if side == "forward":
        return reference.quantize_activations(inputs["x"])[0], inputs["codes"]
    return reference.quantize_rows(inputs["dy"].float() * inputs["gamma"])[0], inputs["codes"].t().contiguous()


class _Side:
    """One of the integer GEMMs of a step, in each form."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.few: dict[str, float] = {}  # milliseconds of each form on few tokens

    def prepare(self, form: str, inputs: Inputs) -> Call:
        """The call of a form; raises `UnavailableError` if another is more than three times as fast on 64 tokens."""
        x_q, codes = _operands(self.name, inputs)
        if not self.few:
            self.few = {name: _milliseconds(make(x_q[:_FEW], codes)) for name, make in INTEGER_FORMS.items()}
        behind = self.few[form] / min(self.few.values())
        if behind > _TOO_SLOW:
            raise UnavailableError(f"{behind:.0f} times slower than another exact form on {_FEW} tokens")
        return INTEGER_FORMS[form](x_q, codes)

    def expected(self, inputs: Inputs) -> tuple[Tensor]:
        """The GEMM by the reference."""
        return (reference.int_matmul(*_operands(self.name, inputs)),)


def _floats(side: str, inputs: Inputs) -> Call:
    x, w, dy = (inputs[name].float() for name in ("x", "w", "dy"))
    return (lambda: dy @ w) if side == "dgrad" else (lambda: dy.t() @ x)


def _expected_floats(side: str, inputs: Inputs) -> tuple[Tensor]:
    x, w, dy = (inputs[name].double() for name in ("x", "w", "dy"))
    return (dy @ w if side == "dgrad" else dy.t() @ x,)


def _as_floats(acc: Tensor) -> tuple[Tensor]:
    return (acc.float(),)


def contenders() -> tuple[Contender, ...]:
    """All raw GEMMs of a step, named "raw SIDE FORM"."""
    made = []
    for name in ("forward", "dgrad"):
        side = _Side(name)
        for form in INTEGER_FORMS:
            prepare = partial(side.prepare, form)
            made.append(Contender(f"raw {name} {form}", prepare, side.expected, raw=True, view=_as_floats))
    for name in ("dgrad", "wgrad"):
        expected = partial(_expected_floats, name)
        rounding = ROUNDING[torch.float32]
        made.append(Contender(f"raw {name} fp32", partial(_floats, name), expected, rounding, raw=True))
    return tuple(made)
