"""Which GEMM runs while which collective is under way, in the order in which things begin and are waited for.

A column-parallel layer's backward pass has two GEMMs, and each hides a collective: the GEMM for dX the gather of
X_q, the GEMM for dW the sum of dX. Nothing is used before it is waited for, or waited for before it is used.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from same_bits import assert_same_bits
from torch import Tensor

from megatron_sbn.functional import LinearSettings, apply_linear, linear, prepare_weight
from megatron_sbn.functional.collectives import AsyncTensor, LocalCollectives

TOKENS, WIDTH, OUT = 6, 32, 16
UNKNOWN = {torch.int8: 77, torch.float32: float("nan")}


class Slow(LocalCollectives):
    """One device, whose collectives give their result when waited for: until then the tensor holds something else."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def _start(self, what: str, t: Tensor) -> AsyncTensor:
        self.events.append(f"start {what}")
        arriving = torch.full_like(t, UNKNOWN[t.dtype])

        def wait() -> Tensor:
            self.events.append(f"wait {what}")
            return arriving.copy_(t)

        return wait

    def start_gather_input(self, t: Tensor) -> AsyncTensor:
        return self._start(f"gather {t.dtype}".replace("torch.", ""), t)

    def start_reduce_grad_input(self, dx: Tensor) -> AsyncTensor:
        return self._start("reduce", dx)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, with the two GEMMs of a backward pass among it."""
    happened: list[str] = []

    def noted(what: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            happened.append(what)
            return function(*args, **kwargs)

        return run

    kernels = linear.kernels
    monkeypatch.setattr(kernels, "input_gradient", noted("dX", kernels.input_gradient))
    monkeypatch.setattr(kernels, "weight_gradient", noted("dW", kernels.weight_gradient))
    plain = linear._matmul

    def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        happened.append({(TOKENS, OUT): "Y", (TOKENS, WIDTH): "dX", (OUT, WIDTH): "dW"}[a.shape[0], b.shape[1]])
        return plain(a, b, dtype)

    monkeypatch.setattr(linear, "_matmul", matmul)
    return happened


def gradients(
    settings: LinearSettings, events: list[str] | None = None, *, trained: bool = True, moved: bool = True
) -> list[Tensor | None]:
    """Y, dX and dW; without dW if the weight is not `trained`, without dX if the input is no function of anything.

    With `events` the collectives are slow, and a mark divides forward from backward.
    """
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, WIDTH, generator=rng, requires_grad=moved)
    w = torch.randn(OUT, WIDTH, generator=rng, requires_grad=trained)
    layout = LocalCollectives() if events is None else Slow(events)
    y = apply_linear(x, w, None, prepare_weight(w, None, settings), settings, layout)
    if events is not None:
        events.append("backward")
    y.backward(torch.randn(TOKENS, OUT, generator=rng))
    return [y.detach(), x.grad, w.grad]


INT8, FLOAT = ["gather int8", "gather float32"], ["gather float32"]
FORMATS = pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        (LinearSettings(), INT8),
        (LinearSettings(backward="int8"), INT8),
        (LinearSettings(activation_bits=None), FLOAT),
        (LinearSettings(weight_format="dense"), FLOAT),
    ],
    ids=["ternary", "int8", "float activations", "dense"],
)


@FORMATS
def test_collectives_run_during_gemms(settings: LinearSettings, tokens: list[str], events: list[str]) -> None:
    results = gradients(settings, events)
    assert events[events.index("backward") + 1 :] == [
        *(f"start {t}" for t in tokens),
        "dX",
        "start reduce",
        *(f"wait {t}" for t in tokens),
        "dW",
        "wait reduce",
    ]
    # The arithmetic is that of a layer which waits at once.
    assert_same_bits(results, gradients(settings))


def test_tokens_and_scales_are_gathered_together_in_forward(events: list[str]) -> None:
    gradients(LinearSettings(), events)
    assert events[: events.index("backward")] == [f"{verb} {t}" for verb in ("start", "wait") for t in INT8]


@FORMATS
@pytest.mark.parametrize("trained", [True, False], ids=["only dW", "only dX"])
def test_what_nobody_needs_is_not_sent(
    settings: LinearSettings, tokens: list[str], trained: bool, events: list[str]
) -> None:
    results = gradients(settings, events, trained=trained, moved=not trained)
    expected = [*(f"{verb} {t}" for verb in ("start", "wait") for t in tokens), "dW"]
    if not trained:
        expected = ["dX", "start reduce", "wait reduce"]
    assert events[events.index("backward") + 1 :] == expected
    assert_same_bits(results, gradients(settings, trained=trained, moved=not trained))
