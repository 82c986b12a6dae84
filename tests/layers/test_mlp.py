"""SiLU: the right values and gradients, and bits that do not depend on where a value stands."""

import pytest
import torch
from packaging.specifiers import SpecifierSet

from megatron_sbn.engines import REQUIRED
from megatron_sbn.layers.mlp import silu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_those_of_fp64(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 1e-6, 88.0])]).to(dtype).requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = silu(x)
    y.backward(grad)
    exact = x.detach().double().requires_grad_()
    expected = torch.nn.functional.silu(exact)
    expected.backward(grad.double())
    # A few roundings in fp32, one in dtype.
    tolerance = 4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2 * (dtype != torch.float32)
    tiny = torch.finfo(dtype).smallest_normal
    for ours, theirs, given in ((y.detach(), expected.detach(), dtype), (x.grad, exact.grad, dtype)):
        assert ours.dtype == given
        # s + x s (1 - s): what s is rounded to comes back times x.
        scale = theirs.abs() if theirs is not exact.grad else (1 + exact.detach().abs()) * grad.double().abs()
        assert ((ours.double() - theirs).abs() <= tolerance * scale + tiny).all()


@pytest.mark.parametrize("value", [-1e30, 1e30, float("-inf"), float("inf")])
def test_extremes_do_not_become_nan_where_the_limit_is_finite(value: float) -> None:
    y = silu(torch.tensor([value]))
    limit = max(value, 0.0)
    if value == float("-inf"):
        assert y.isnan().all()  # -inf / inf, as torch's own
    else:
        assert torch.equal(y, torch.tensor([limit]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 7, 17, 129, 352])
def test_bits_do_not_depend_on_the_position(width: int, dtype: torch.dtype) -> None:
    """A column shard of odd width, forward and backward, has the bits of the whole (docs/method.md, "Forward")."""
    rng = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(5, 2 * width + 13, generator=rng).mul(3).to(dtype) for _ in range(2))
    whole = x.clone().requires_grad_()
    silu(whole).backward(grad)
    for start in (0, 1, 13, width + 5):
        part = x[:, start : start + width].clone().requires_grad_()
        y = silu(part)
        y.backward(grad[:, start : start + width])
        assert torch.equal(y, silu(x)[:, start : start + width])
        assert torch.equal(part.grad, whole.grad[:, start : start + width])
        assert torch.equal(silu(x[:, start : start + width]), y)  # a view that is not contiguous


def test_only_the_input_is_saved() -> None:
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        silu(torch.ones(4, dtype=torch.bfloat16, requires_grad=True))
    assert [t.dtype for t in saved] == [torch.bfloat16]


def test_a_subclass_of_mlp_is_not_built_by_all_releases() -> None:
    """Fails once 0.16 and 0.17 are not taken any more; `as_mlp_submodule` then builds what fuse_swiglu makes."""
    assert "0.17.1" in SpecifierSet(REQUIRED["megatron-core"]), "build GatedMlp in layers/spec.py, drop fuse_swiglu"
