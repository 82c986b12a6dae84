"""Backends are chosen by name: an unknown one is an error that lists what there is."""

import inspect

import pytest
import sbn_kernels as kernels
import torch
from sbn_kernels import dispatch, reference, registry

W = torch.randn(8, 16)
X_Q, S_X = reference.quantize_activations(torch.randn(3, 16))
CODES, GAMMA = kernels.ternary_codes(W, 6, 8, backend="reference")
ROWS = GAMMA.expand(8)
WEIGHT = kernels.TernaryWeight(CODES, ROWS)
DY = torch.randn(3, 8)
CALLS = {
    "nm_mask": (W, 6, 8),
    "ternary_codes": (W, 6, 8),
    "codes_from_gamma": (W, ROWS, 6, 8),
    "activation_abs_max": (W,),
    "quantize_activations": (W,),
    "int_matmul": (X_Q, WEIGHT),
    "scale_accumulator": (torch.ones(3, 8), S_X, ROWS),
    "ternary_linear": (X_Q, S_X, WEIGHT),
    "input_gradient": (DY, WEIGHT),
    "weight_gradient": (DY, X_Q, S_X),
    "logit_statistics": (DY, torch.tensor([0, 7, -1])),
    "logit_gradient": (DY, torch.logsumexp(DY, 1), torch.tensor([0, 7, -1]), torch.bfloat16),
}


def copies(arguments: tuple[object, ...]) -> list[object]:
    """Some functions use the memory of what they are given."""
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


def test_every_dispatched_function_is_covered_here() -> None:
    takes_backend = {
        name
        for name, function in inspect.getmembers(dispatch, inspect.isfunction)
        if not name.startswith("_") and "backend" in inspect.signature(function).parameters
    }
    fused = {"quantize_rms_norm", "rms_norm_backward", "quantize_swiglu", "swiglu_abs_max", "swiglu_backward"}
    assert takes_backend - {"find", "resolve"} - fused == set(CALLS)
    with pytest.raises(ValueError, match="backend 'cpu' has no rms_norm_quantize: that is one kernel on CUDA alone"):
        kernels.quantize_rms_norm(W, W[0])


@pytest.mark.parametrize("name", CALLS)
def test_backends_agree_and_unknown_ones_are_refused(name: str) -> None:
    function = vars(kernels)[name]
    results = [function(*copies(CALLS[name]), backend=backend) for backend in ("reference", "cpu", "auto")]
    first, *others = [r if isinstance(r, tuple) else (r,) for r in results]
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 if name.endswith("gradient") else 0.0)
    with pytest.raises(ValueError, match="backend 'nonesuch' is not one of: auto, cpu, triton, reference"):
        function(*CALLS[name], backend="nonesuch")


def test_auto_knows_the_devices_there_are_kernels_for() -> None:
    assert registry.resolve("auto", torch.device("cpu")) == "cpu"
    assert registry.resolve("auto", torch.device("cuda", 0)) == "triton"
    assert registry.resolve("reference", torch.device("cuda")) == "reference"
    with pytest.raises(ValueError, match="backend 'cpu' needs CPU tensors, got cuda"):
        registry.resolve("cpu", torch.device("cuda"))
    with pytest.raises(ValueError, match="knows CPU and CUDA, not mps"):
        registry.resolve("auto", torch.device("mps"))
