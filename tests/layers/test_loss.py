"""Chunked linear + cross-entropy on one device, against PyTorch's in fp64."""

import resource

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sbn.layers import loss
from megatron_sbn.layers.loss import IGNORED, linear_cross_entropy

TOKENS, HIDDEN, VOCABULARY = 37, 24, 301


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.3).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[[0, 11]] = IGNORED
    return hidden, weight, labels


def exact(hidden: Tensor, weight: Tensor, labels: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, w = hidden.detach().double().requires_grad_(), weight.detach().to(hidden.dtype).double().requires_grad_()
    losses = F.cross_entropy(h @ w.t(), labels, reduction="none", ignore_index=IGNORED)
    losses.backward(grad.double())
    assert h.grad is not None
    assert w.grad is not None
    return losses.detach(), h.grad, w.grad


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_bytes", [1, 4 * VOCABULARY * 7, 1 << 30])
def test_losses_and_gradients_at_any_block_size(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int, dtype: torch.dtype, uniform: bool
) -> None:
    monkeypatch.setattr(loss, "BLOCK_BYTES", block_bytes)
    hidden, weight, labels = inputs(dtype)
    losses = linear_cross_entropy(hidden, weight, labels, uniform_gradient=uniform)
    grad = torch.full((TOKENS,), 0.25) if uniform else torch.linspace(-1, 1, TOKENS)
    losses.backward(grad)
    expected, dh, dw = exact(hidden, weight, labels, grad)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}[dtype]
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-5)
    assert losses[0] == losses[11] == 0.0
    torch.testing.assert_close(hidden.grad.double(), dh, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weight.grad.double(), dw, rtol=tolerance, atol=tolerance)
    assert weight.grad.dtype == torch.float32
    assert not hidden.grad[[0, 11]].any()


@pytest.mark.parametrize("count", [96, 75])
def test_the_mean_over_any_number_of_tokens_scales_by_no_other_factor(count: int) -> None:
    """1/96 and 1/75 are 0.2% larger and smaller in bf16; rounding each element is off by less on average."""
    hidden, weight, labels = inputs(torch.bfloat16)
    linear_cross_entropy(hidden, weight, labels).backward(torch.full((TOKENS,), 1 / count))
    ours = hidden.grad.double()
    _, dh, _ = exact(hidden, weight, labels, torch.full((TOKENS,), 1 / count))
    assert float((ours * dh).sum() / dh.square().sum()) == pytest.approx(1.0, abs=5e-4)


def test_gradients_that_differ_over_tokens_are_refused_unless_asked_for() -> None:
    hidden, weight, labels = inputs()
    losses = linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(ValueError, match="pass uniform_gradient=False"):
        losses.backward(torch.linspace(0, 1, TOKENS))
    ignored_may_differ = torch.ones(TOKENS)
    ignored_may_differ[[0, 11]] = 0.0
    linear_cross_entropy(hidden, weight, labels).backward(ignored_may_differ)
    assert hidden.grad is not None


def test_no_gradient_is_made_when_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs()
    with_gradient = linear_cross_entropy(hidden, weight, labels).detach()
    monkeypatch.setattr(loss, "_add_block", None)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, labels), with_gradient)


def test_all_labels_ignored_is_a_loss_of_zero() -> None:
    hidden, weight, labels = inputs()
    losses = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED))
    losses.sum().backward()
    assert not losses.any()
    assert not hidden.grad.any()


def test_nan_reaches_the_loss_of_its_token_alone() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        hidden[5, 0] = torch.nan
    losses = linear_cross_entropy(hidden, weight, labels)
    assert losses.isnan().nonzero().flatten().tolist() == [5]


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    """At the vocabulary of Qwen2.5: 2,048 tokens' logits would be 1.24 GB, a block is at most 192 MB."""
    tokens, vocabulary, hidden_size = 2048, 151936, 8
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    linear_cross_entropy(hidden[:8], weight, labels[:8]).mean().backward()  # allocators warm
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    linear_cross_entropy(hidden, weight, labels).mean().backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 256 * 2**20


def test_shapes_that_do_not_fit_are_named() -> None:
    hidden, weight, labels = inputs()
    with pytest.raises(ValueError, match=r"the head takes \[..., 23\]"):
        linear_cross_entropy(hidden, weight[:, :23], labels)
