"""Causal core attention by torch's scaled_dot_product_attention, with grouped key/value heads.

`softmax(Q K^T / sqrt(d) + causal) V` per head. Megatron-Core's own needs Transformer Engine or materialises the
[tokens x tokens] scores; torch picks a flash kernel where there is one.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class SdpaAttention(nn.Module):
    """Causal self-attention over whole sequences, built as Megatron-Core builds its core attention.

    Raises ValueError for what it cannot compute: another mask, packed sequences, dropout.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"attention is causal self-attention only, not {attention_type} with {attn_mask_type}")
        if config.attention_dropout or config.context_parallel_size > 1:
            raise ValueError("attention has neither dropout nor context parallelism; set both off")
        self.softmax_scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> torch.Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d]."""
        if packed_seq_params is not None or attention_bias is not None:
            raise ValueError("packed sequences and attention biases are not supported")
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, heads, s, d]
        grouped = q.shape[1] != k.shape[1]
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped)
        return context.permute(2, 0, 1, 3).flatten(2)
