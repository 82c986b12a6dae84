"""The custom operators: schemas, shape functions, torch.compile and activation recomputation."""

from collections.abc import Callable

import pytest
import sbn_kernels as kernels
import torch
from same_bits import assert_same_bits
from sbn_kernels import TernaryWeight, ops
from torch.utils.checkpoint import checkpoint

from megatron_sbn.functional import sparse_bitlinear
from megatron_sbn.functional.settings import Backward

W, X, DY = torch.randn(24, 16), torch.randn(2, 3, 16), torch.randn(2, 3, 24)
CODES, GAMMA = kernels.ternary_codes(W, 6, 8, backend="reference")
ROWS = GAMMA.expand(24).contiguous()
X_Q, S_X = kernels.quantize_activations(X, backend="reference")
WEIGHT = TernaryWeight(CODES, ROWS)
FIELDS = WEIGHT.operator_fields()
ACC = kernels.int_matmul(X_Q, WEIGHT, backend="reference")
BIAS = torch.randn(24)
CALLS = (
    (ops.quantize_activations, (X, 8, None), ()),
    (ops.quantize_activations, (X, 8, X.abs().amax(-1)), ()),
    (ops.int_matmul, (X_Q,), FIELDS),
    (ops.scale_accumulator, (ACC, S_X, ROWS, BIAS, torch.bfloat16), ()),
    (ops.ternary_linear, (X_Q, S_X, None, torch.float32), FIELDS),
    (ops.ternary_linear, (X_Q, S_X, BIAS, torch.bfloat16), FIELDS),
    (ops.input_gradient, (DY, "exact"), FIELDS),
    (ops.input_gradient, (DY.bfloat16(), "int8_dgrad"), (CODES, ROWS, CODES.t().contiguous(), [0, 24], "dense", [], 0)),
    (ops.weight_gradient, (DY, X_Q, S_X, "exact"), ()),
    (ops.weight_gradient, (DY, X_Q, S_X, "int8"), ()),
)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("call", CALLS, ids=lambda c: c[0]._name)
def test_schemas_and_shape_functions_tell_the_truth(call: tuple[object, tuple, tuple], backend: str) -> None:
    operator, arguments = call[0], (*call[1], backend, *call[2])
    if backend == "triton" and torch.cuda.is_available():
        arguments = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=checks)


def differentiable(mode: str, form: str = "dense", backend: str = "auto") -> object:
    """The layer as one operator, on weights that were prepared before."""
    codes, gamma = kernels.ternary_codes(W, 6, 8, splits=[16, 8], backend="reference")
    rows = kernels.gamma_rows(gamma, (16, 8)).contiguous()
    packed = kernels.pack_form(form, codes, 6, 8) if form != "dense" else ()
    weight = TernaryWeight(codes, rows, None, (0, 16, 24), form, packed, group=8)

    def run(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return kernels.quantized_linear(torch.tanh(x), w, weight, bias, mode=mode, backend=backend) * 2

    return run


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.activation_abs_max(X.clone().requires_grad_(), "cpu"),
        lambda: ops.quantize_activations(X.clone().requires_grad_(), 8, None, "cpu")[1],
        lambda: ops.scale_accumulator(ACC.clone().requires_grad_(), S_X, ROWS, None, torch.float32, "cpu"),
        lambda: ops.ternary_linear(X_Q, S_X, BIAS.clone().requires_grad_(), torch.float32, "cpu", *FIELDS),
    ],
    ids=["activation_abs_max", "quantize_activations", "scale_accumulator", "ternary_linear"],
)
def test_a_part_of_the_layer_has_no_gradient_of_its_own_and_says_so(call: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        call().sum().backward()


@pytest.mark.parametrize("mode", ["exact", "int8_dgrad", "int8"])
def test_the_differentiable_operator_is_the_layer(mode: str) -> None:
    expected = gradients(lambda *t: layer(*t, backward=mode))
    plain = gradients(differentiable(mode))
    assert_same_bits(plain, expected)
    again = gradients(lambda *t: checkpoint(differentiable(mode), *t, use_reentrant=False))
    assert_same_bits(again, plain)
    compiled = gradients(torch.compile(differentiable(mode), backend="aot_eager", fullgraph=True))
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_differentiable_operator_takes_every_form() -> None:
    expected = gradients(differentiable("exact", backend="triton"))
    packed = gradients(differentiable("exact", "planes", "triton"))
    assert_same_bits(packed, expected)


def test_the_differentiable_operator_gives_what_is_asked_for() -> None:
    x, w = X.clone().bfloat16(), W.clone().bfloat16().requires_grad_()
    y = kernels.quantized_linear(x, w, WEIGHT, None)
    y.sum().backward()
    assert (y.dtype, x.grad) == (torch.bfloat16, None)
    assert w.grad is not None
    assert w.grad.dtype == torch.bfloat16
    with torch.no_grad():
        assert_same_bits(kernels.quantized_linear(x, w, WEIGHT), y)


def test_codes_of_another_weight_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the weight is \(16, 16\), its codes \(24, 16\)"):
        kernels.quantized_linear(X, W[:16], WEIGHT)


@pytest.mark.parametrize("bias", [None, BIAS], ids=["no bias", "bias"])
def test_the_differentiable_operator_tells_the_truth(bias: torch.Tensor | None) -> None:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    arguments = (x, w, bias, 8, "exact", "cpu", *FIELDS)
    torch.library.opcheck(torch.ops.sbn.quantized_linear.default, arguments)


def layer(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, backward: Backward = "exact") -> torch.Tensor:
    return sparse_bitlinear(torch.tanh(x), w, bias=bias, splits=[16, 8], backward=backward) * 2


def gradients(function: object) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in (X, W, BIAS)]
    y = function(*leaves)  # type: ignore[operator]
    y.backward(DY)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def test_recomputation_gives_the_same_bits() -> None:
    plain = gradients(layer)
    again = gradients(lambda *t: checkpoint(layer, *t, use_reentrant=False))
    assert_same_bits(plain, again)


def prepared_layer(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A layer whose weights were prepared before, as in training."""
    from megatron_sbn.functional import LinearSettings, PreparedWeight, apply_linear
    from megatron_sbn.functional.collectives import LocalCollectives

    return apply_linear(torch.tanh(x), w, bias, PreparedWeight(WEIGHT), LinearSettings(), LocalCollectives()) * 2


def test_compilation_traces_the_layer_as_one_graph() -> None:
    plain = gradients(prepared_layer)
    compiled = gradients(torch.compile(prepared_layer, backend="aot_eager", fullgraph=True))
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
