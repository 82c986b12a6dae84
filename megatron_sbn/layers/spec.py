"""The only place that tells Megatron-Core about our layers: one transformer block, as a specification.

Megatron-Core's own local specification hard-codes its linear layers; this one names ours. Attention and MLP themselves,
their rotary embeddings, residuals and pipeline plumbing are Megatron-Core's.
"""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_sbn import engines
from megatron_sbn.layers.attention import SdpaAttention
from megatron_sbn.layers.experts import mixture_spec
from megatron_sbn.layers.linear import GatedLinear, QkvLinear, RowParallelLinear
from megatron_sbn.layers.norm import RMSNorm


def layer_spec(mixture: bool = False) -> ModuleSpec:
    """One pre-norm transformer layer: RMSNorm, grouped-query attention, RMSNorm, gated MLP or a mixture of them."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=QkvLinear,
            core_attention=SdpaAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    linears = MLPSubmodules(linear_fc1=GatedLinear, linear_fc2=RowParallelLinear)
    builder = engines.megatron_core_is_at_least("0.18")
    dense = partial(MLP.as_mlp_submodule, submodules=linears) if builder else ModuleSpec(module=MLP, submodules=linears)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mixture_spec() if mixture else dense,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(num_layers: int, mixture: bool = False) -> TransformerBlockSubmodules:
    """`num_layers` layers (those of one pipeline stage or model chunk) and the norm after the last."""
    return TransformerBlockSubmodules(layer_specs=[layer_spec(mixture)] * num_layers, layer_norm=RMSNorm)
