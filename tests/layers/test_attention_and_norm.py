"""SdpaAttention and RMSNorm against their formulas in fp64."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_sbn.layers.attention import SdpaAttention
from megatron_sbn.layers.norm import RMSNorm

CONFIG = SimpleNamespace(
    attention_dropout=0.0, context_parallel_size=1, kv_channels=8, params_dtype=torch.float32, sequence_parallel=True
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(**changes: object) -> SdpaAttention:
    return SdpaAttention(SimpleNamespace(**(vars(CONFIG) | changes)), 1, AttnMaskType.causal, "self")


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V over the past, head by head; [s, b, heads, d] and [s, b, groups, d]."""
    s, b, heads, d = q.shape
    out = torch.zeros(s, b, heads, d, dtype=torch.float64)
    for head in range(heads):
        group = head // (heads // k.shape[2])
        for token in range(s):
            scores = torch.einsum("bd,sbd->bs", q[token, :, head], k[: token + 1, :, group]) / d**0.5
            out[token, :, head] = torch.einsum("bs,sbd->bd", scores.softmax(-1), v[: token + 1, :, group])
    return out.reshape(s, b, heads * d)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_is_its_formula(groups: int) -> None:
    tensors = draw(9, 2, 4, 8), draw(9, 2, groups, 8, seed=1), draw(9, 2, groups, 8, seed=2)
    ours = [t.clone().requires_grad_() for t in tensors]
    theirs = [t.double().requires_grad_() for t in tensors]
    y, expected = attention()(*ours, None), naive(*theirs)
    grad = draw(*y.shape, seed=3)
    y.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-6)


def test_attention_over_a_share_of_the_heads_has_the_same_bits() -> None:
    q, k, v = draw(16, 2, 4, 8), draw(16, 2, 2, 8, seed=1), draw(16, 2, 2, 8, seed=2)
    whole = attention()(q, k, v, None)
    for rank in range(2):
        share = attention()(q[:, :, 2 * rank : 2 * rank + 2], k[:, :, [rank]], v[:, :, [rank]], None)
        assert torch.equal(share, whole[..., 16 * rank : 16 * rank + 16])


def test_what_attention_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="neither dropout nor context parallelism"):
        attention(attention_dropout=0.1)
    with pytest.raises(ValueError, match="neither dropout nor context parallelism"):
        attention(context_parallel_size=2)
    with pytest.raises(ValueError, match="causal self-attention only"):
        SdpaAttention(CONFIG, 1, AttnMaskType.padding, "self")
    with pytest.raises(ValueError, match="causal self-attention only"):
        SdpaAttention(CONFIG, 1, AttnMaskType.causal, "cross")
    q = draw(2, 1, 1, 8)
    with pytest.raises(ValueError, match="packed sequences and attention biases"):
        attention()(q, q, q, None, packed_seq_params=object())
    with pytest.raises(ValueError, match="packed sequences and attention biases"):
        attention()(q, q, q, None, attention_bias=q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_is_its_formula(dtype: torch.dtype) -> None:
    norm = RMSNorm(CONFIG, 48, eps=1e-3)
    norm.weight.data.copy_(1 + 0.1 * draw(48, seed=4))
    x = (0.05 * draw(7, 3, 48)).to(dtype).requires_grad_()
    grad = draw(7, 3, 48, seed=5).to(dtype)
    y = norm(x)
    y.backward(grad)
    exact, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    expected.backward(grad.double())
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    assert y.dtype == x.grad.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(
        x.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * float(exact.grad.abs().max())
    )
    # Summed in fp32 whatever the activations are.
    assert norm.weight.grad.dtype == torch.float32
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-4)


def test_norm_of_a_share_of_the_tokens_has_the_same_bits_and_asks_for_the_sum() -> None:
    norm, x = RMSNorm(CONFIG, 37), draw(12, 2, 37)
    assert torch.equal(norm(x)[3:6], norm(x[3:6]))
    assert norm.weight.sequence_parallel is True
    assert (
        RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 4).weight.sequence_parallel
        is False
    )
