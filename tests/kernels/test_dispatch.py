"""Backends are chosen by name: an unknown one is an error that lists what there is."""

import inspect

import pytest
import sbn_kernels as kernels
import torch
from sbn_kernels import dispatch, reference

W = torch.randn(8, 16)
X_Q, S_X = reference.quantize_activations(torch.randn(3, 16))
CODES, GAMMA = reference.ternary_codes(W, 6, 8)
ROWS = GAMMA.expand(8)
CALLS = {
    "nm_mask": (W, 6, 8),
    "ternary_codes": (W, 6, 8),
    "codes_from_gamma": (W, ROWS, 6, 8),
    "quantize_activations": (W,),
    "quantize_rows": (W,),
    "int_matmul": (X_Q, CODES),
    "int8_matmul": (X_Q, CODES),
    "scale_accumulator": (torch.ones(3, 8), S_X, ROWS),
    "ternary_linear": (X_Q, S_X, CODES, ROWS),
}


def test_every_dispatched_function_is_covered_here() -> None:
    takes_backend = {
        name
        for name, function in inspect.getmembers(dispatch, inspect.isfunction)
        if not name.startswith("_") and "backend" in inspect.signature(function).parameters
    }
    assert takes_backend == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_named_backend_runs_and_unknown_ones_are_refused(name: str) -> None:
    function = vars(kernels)[name]
    results = function(*CALLS[name], backend="reference"), vars(reference)[name](*CALLS[name])
    first, second = (r if isinstance(r, tuple) else (r,) for r in results)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(ValueError, match=f"backend 'nonesuch' has no {name}; available: reference"):
        function(*CALLS[name], backend="nonesuch")
