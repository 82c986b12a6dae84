"""Recipe -> this rank's stages of a Megatron-Core GPTModel, with Sparse-BitNet layers and layout-free initial weights.

Embeddings and head are dense. Parameters are fp32; activations are bf16 or fp32 from the embedding's output on, as
`model.bf16` says.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from sbn_kernels import tuning
from torch import Tensor, nn

from megatron_sbn.config import Recipe
from megatron_sbn.errors import InputError
from megatron_sbn.layers.experts import average_expert_tokens, globally_numbered, mixture_settings
from megatron_sbn.layers.head import HeadLinear
from megatron_sbn.layers.linear import SparseBitLinear
from megatron_sbn.layers.mlp import fuse_swiglu, silu
from megatron_sbn.layers.spec import block_spec
from megatron_sbn.layers.weight_quantizer import WeightQuantizer
from megatron_sbn.parallel.shard import LogicalParameter, LogicalShard, initial_normal, row_shard, unsharded
from megatron_sbn.parallel.state import ParallelState

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"


class SparseBitModel(GPTModel):
    """Megatron-Core's GPTModel, with the loss made block by block instead of from the logits of all tokens."""

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor | None = None, **rest: Any) -> Tensor:  # noqa: ANN401
        if labels is None or not self.post_process:
            output: Tensor = super()._postprocess(hidden_states, labels=labels, **rest)
            return output
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        losses: Tensor = self.output_layer(hidden_states, weight, labels=labels.t())[0]
        return losses.t()


@dataclass(frozen=True)
class ModelChunks:
    """The model chunks of this pipeline rank (one, or several under interleaved scheduling)."""

    chunks: nn.ModuleList
    config: TransformerConfig
    state: WeightQuantizer
    parameters: tuple[LogicalParameter, ...]

    @property
    def tied_embedding(self) -> nn.Parameter | None:
        """This rank's copy of an embedding that is the head too; None where there is none."""
        if not any(chunk.share_embeddings_and_output_weights for chunk in self.chunks):
            return None
        return next((p.parameter for p in self.parameters if p.name == EMBEDDING), None)


def transformer_config(recipe: Recipe) -> TransformerConfig:
    """Megatron-Core's configuration of the recipe's model and layout."""
    model, parallel = recipe.model, recipe.parallel
    recompute = model.recompute_granularity
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.layernorm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        rotary_interleaved=model.rotary_interleaved,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        params_dtype=torch.float32,
        pipeline_dtype=activation_dtype(recipe),
        bf16=model.bf16,
        recompute_granularity=recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=True,
        batch_p2p_comm=torch.cuda.is_available(),
        **mixture_settings(model, parallel),
    )


def activation_dtype(recipe: Recipe) -> torch.dtype:
    """dtype of hidden states and floating GEMMs."""
    return torch.bfloat16 if recipe.model.bf16 else torch.float32


def build_model_chunks(recipe: Recipe, parallel: ParallelState) -> ModelChunks:
    """This rank's chunks with their initial weights; `state.prepare(step)` comes before the first forward pass.

    Raises InputError if the table of measured kernels is damaged or cannot be written.
    """
    try:
        tuning.check_table()
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from None
    config = transformer_config(recipe)
    count = recipe.parallel.virtual_pipeline or 1
    chunks = nn.ModuleList(_build_chunk(recipe, config, parallel, index, count) for index in range(count))
    parameters = tuple(p for chunk in chunks for p in _logical_parameters(chunk, parallel))
    for logical in parameters:
        _initialize(logical, recipe)
    layers = {name: layer for chunk in chunks for name, layer in _sparse_layers(chunk).items()}
    micro_batches = recipe.training.global_batch_size // (recipe.training.micro_batch_size * parallel.data.size)
    tokens = recipe.training.micro_batch_size * recipe.model.seq_length
    state = WeightQuantizer(
        layers,
        recipe.linear,
        parallel.tensor.group,
        micro_batches,
        tokens,
        activation_dtype(recipe),
        average_expert_tokens(recipe, tokens),
    )
    return ModelChunks(chunks.to(parallel.device), config, state, parameters)


def _build_chunk(
    recipe: Recipe, config: TransformerConfig, parallel: ParallelState, index: int, count: int
) -> SparseBitModel:
    model = recipe.model
    first = parallel.pipeline.rank == 0 and index == 0
    last = parallel.is_last_stage and index == count - 1
    groups = ProcessGroupCollection.use_mpu_process_groups()
    chunk = SparseBitModel(
        config=config,
        transformer_layer_spec=block_spec(
            get_num_layers_to_build(config, index if count > 1 else None, parallel.pipeline.rank),
            mixture=model.num_moe_experts is not None,
        ),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.seq_length,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        pg_collection=groups,
        vp_stage=index if count > 1 else None,
    )
    for layer in chunk.decoder.layers:
        layer.self_attention.linear_qkv.fuse_norm(layer.input_layernorm)
        if isinstance(layer.mlp, MLP):  # the router of a mixture reads what the norm returns
            layer.mlp.linear_fc1.fuse_norm(layer.pre_mlp_layernorm)
            fuse_swiglu(layer.mlp)
    if first:
        dtype = activation_dtype(recipe)
        chunk.embedding.register_forward_hook(lambda _module, _inputs, output: output.to(dtype))
    if last:
        chunk.output_layer = HeadLinear(
            model.hidden_size,
            model.padded_vocab_size,
            config=config,
            tp_group=parallel.tensor.group,
            bias=False,
            skip_bias_add=False,
            skip_weight_param_allocation=first and model.share_embeddings_and_output_weights,
        )
    return chunk


def _global_name(chunk: GPTModel, local: str) -> str:
    """Layer numbers are stage-local in Megatron-Core's names; `layer_number` counts over the whole model from 1.

    The numbers of experts are local to the rank, likewise.
    """
    prefix = "decoder.layers."
    if not local.startswith(prefix):
        return local
    index, _, rest = local.removeprefix(prefix).partition(".")
    layer = chunk.decoder.layers[int(index)]
    return globally_numbered(f"{prefix}{layer.layer_number - 1}.{rest}", layer.mlp)


def _sparse_layers(chunk: GPTModel) -> dict[str, SparseBitLinear]:
    """Attention and MLP projections by global name; the head is not one of them."""
    return {
        _global_name(chunk, name): module
        for name, module in chunk.named_modules()
        if isinstance(module, SparseBitLinear) and not isinstance(module, HeadLinear)
    }


def _logical_parameters(chunk: GPTModel, parallel: ParallelState) -> list[LogicalParameter]:
    shards: dict[str, LogicalShard] = {}
    for name, module in chunk.named_modules():
        if isinstance(module, SparseBitLinear):
            shards |= {f"{name}.{key}": shard for key, shard in module.shards().items()}
    result = []
    for name, parameter in chunk.named_parameters():
        if name == EMBEDDING:
            rows = parameter.shape[0] * parallel.tensor.size
            shard = row_shard((rows, parameter.shape[1]), parallel.tensor.rank, parallel.tensor.size)
            parameter.tensor_model_parallel = parallel.tensor.size > 1
        else:
            shard = shards.get(name) or unsharded(tuple(parameter.shape))
        tied = name == HEAD and chunk.share_embeddings_and_output_weights
        result.append(LogicalParameter(EMBEDDING if tied else _global_name(chunk, name), parameter, shard))
        # The embedding's copy on the last stage is a replica: it counts once in the gradient norm.
        if tied:
            parameter.ds_pipe_replicated = True
    return result


def _initialize(logical: LogicalParameter, recipe: Recipe) -> None:
    """Normal(0, std) matrices, those that write to the residual scaled by 1/sqrt(2 layers); norms 1, biases 0."""
    if len(logical.shard.shape) == 1:
        return
    std = recipe.model.init_method_std
    if logical.name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * recipe.model.num_layers)
    full = initial_normal(logical.name, logical.shard.shape, std, recipe.training.seed)
    with torch.no_grad():
        logical.parameter.copy_(logical.shard.take(full))


def language_model_loss(chunk: GPTModel, tokens: Tensor, labels: Tensor) -> Tensor:
    """Loss of every token, fp32 [batch, tokens], on the last stage; hidden states on the others."""
    return chunk(input_ids=tokens, position_ids=None, attention_mask=None, labels=labels)
