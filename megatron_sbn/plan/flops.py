"""Floating-point operations that a token costs the model: the arithmetic of the method, not of an implementation.

Per token, with P weights in the sparse-able linear layers that the token passes, V the head's, R the routers', L
layers, s tokens a sample, a = heads x head width; a multiply-add is 2 operations, backward costs twice forward:

    dense  = 6 (P + V + R) + 6 L s a
    sparse = (2 N/M + 4) P + 6 (V + R) + 6 L s a

A token passes model.moe_router_topk of a mixture's experts, so P counts those, not all; without experts R is 0.

The attention term is the usual 12 L s a, halved because a causal query sees half of the keys on average. Only forward
can use N:M (gradients are dense), so the two differ in forward's part of P alone. Recomputation, norms, softmax,
rotary embeddings, embedding look-ups and the optimizer are not counted; the head is, at its padded size. Pure integers
and rationals; imports no torch.
"""

from fractions import Fraction

from megatron_sbn.config import Model, Recipe


def linear_weights(model: Model) -> int:
    """P: weights of the attention and MLP projections that a token passes, without biases."""
    attention = model.num_attention_heads * model.head_dim
    keys_and_values = 2 * model.query_groups * model.head_dim
    qkv = model.hidden_size * (attention + keys_and_values)
    passed = 1 if model.num_moe_experts is None else model.moe_router_topk
    mlp = passed * 3 * model.hidden_size * model.mlp_width  # gate, up, down
    return model.num_layers * (qkv + attention * model.hidden_size + mlp)


def model_flops_per_token(recipe: Recipe, step: int = 0) -> tuple[float, float]:
    """(dense, sparse) operations of one token's forward and backward pass, under the sparsity in force at `step`."""
    model = recipe.model
    linear = linear_weights(model)
    router = model.num_layers * model.hidden_size * (model.num_moe_experts or 0)
    floating = model.hidden_size * model.padded_vocab_size + router
    attention = 6 * model.num_layers * model.seq_length * model.num_attention_heads * model.head_dim
    n, m = recipe.linear.at(step).sparsity
    sparse = (2 * Fraction(n, m) + 4) * linear + 6 * floating + attention
    return float(6 * (linear + floating) + attention), float(sparse)
