"""The custom operators: schemas, shape functions, torch.compile and activation recomputation."""

import pytest
import sbn_kernels as kernels
import torch
from sbn_kernels import ops
from torch.utils.checkpoint import checkpoint

from megatron_sbn.functional import sparse_bitlinear

W, X, DY = torch.randn(24, 16), torch.randn(2, 3, 16), torch.randn(2, 3, 24)
CODES, GAMMA = kernels.ternary_codes(W, 6, 8, backend="reference")
ROWS = GAMMA.expand(24).contiguous()
X_Q, S_X = kernels.quantize_activations(X, backend="reference")
ACC = kernels.int_matmul(X_Q, CODES, backend="reference")
BIAS = torch.randn(24)
CALLS = (
    (ops.quantize_activations, (X, 8, None)),
    (ops.quantize_activations, (X, 8, X.abs().amax(-1))),
    (ops.int_matmul, (X_Q, CODES, [], "dense", 0)),
    (ops.scale_accumulator, (ACC, S_X, ROWS, BIAS, torch.bfloat16)),
    (ops.ternary_linear, (X_Q, S_X, CODES, ROWS, None, torch.float32, [], "dense", 0)),
    (ops.ternary_linear, (X_Q, S_X, CODES, ROWS, BIAS, torch.bfloat16, [], "dense", 0)),
    (ops.input_gradient, (DY, CODES, ROWS, None, "exact", None)),
    (ops.input_gradient, (DY.bfloat16(), CODES, ROWS, CODES.t().contiguous(), "int8_dgrad", [0, 24])),
    (ops.weight_gradient, (DY, X_Q, S_X, "exact")),
    (ops.weight_gradient, (DY, X_Q, S_X, "int8")),
)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
@pytest.mark.parametrize("call", CALLS, ids=lambda c: c[0]._name)
def test_schemas_and_shape_functions_tell_the_truth(call: tuple[object, tuple[object, ...]], backend: str) -> None:
    operator, arguments = call
    if backend == "triton" and torch.cuda.is_available():
        arguments = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (*arguments, backend), test_utils=checks)


def layer(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return sparse_bitlinear(torch.tanh(x), w, bias=bias, splits=[16, 8]) * 2


def gradients(function: object) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in (X, W, BIAS)]
    y = function(*leaves)  # type: ignore[operator]
    y.backward(DY)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def test_recomputation_gives_the_same_bits() -> None:
    plain = gradients(layer)
    again = gradients(lambda *t: checkpoint(layer, *t, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def prepared_layer(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A layer whose weights were prepared before, as in training."""
    from megatron_sbn.functional import LinearSettings, PreparedWeight, apply_linear
    from megatron_sbn.token_layout import TokenLayout

    return apply_linear(torch.tanh(x), w, bias, PreparedWeight(CODES, ROWS), LinearSettings(), TokenLayout()) * 2


def test_compilation_traces_the_layer_as_one_graph() -> None:
    plain = gradients(prepared_layer)
    compiled = gradients(torch.compile(prepared_layer, backend="aot_eager", fullgraph=True))
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
