"""A mixture of experts in place of a layer's MLP: Megatron-Core's layer and dispatcher, our experts and our router.

    p = softmax of the k largest of x R^T            R [experts, hidden], dense, fp32 (k = 1: of all of them)
    y = sum over those e of FC2_e(p_e * SwiGLU(FC1_e(x)))

Every expert is a gated MLP of two Sparse-BitNet linears with masks and scales of its own. An expert is whole on its
rank: its weights are not sharded, and its tokens are those of all ranks of the expert-parallel group, Megatron-Core's
dispatcher gathers and sums. That is its `allgather` dispatcher on every machine: its `alltoall` one needs CUDA
streams to be built.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_sbn.config import Model, Parallel, Recipe
from megatron_sbn.layers.linear import GatedLinear, RowParallelLinear
from megatron_sbn.parallel.shard import EXPERTS

TOKEN_DISPATCHER = "allgather"


class Router(TopKRouter):
    """Megatron-Core's top-k router with logits in fp32 whatever the activations are.

    Its own product asks for a Transformer Engine function by name, and fails where that is not installed.
    """

    def reset_parameters(self) -> None:
        """A bias of zero: like all biases here, and unlike memory that was never written."""
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def gating(self, input: Tensor) -> Tensor:
        """[tokens, batch, hidden] -> logits, fp32 [tokens, batch, experts]."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(input.float(), self.weight.float(), bias)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Nothing: there is no expert bias. Megatron-Core hands this call to a compiler."""


class ExpertDown(RowParallelLinear):
    """An expert's down projection. Megatron-Core adds its bias, weighted by the router as the output is, and in place:
    autograd allows that in no custom function's own output.
    """

    returns_bias = True

    def forward(self, x: Tensor, weight: Tensor | None = None, **rest: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
        """[tokens, in] -> ([tokens, out], bias that the caller adds, or None)."""
        y, bias = super().forward(x, weight, **rest)
        return (y if bias is None else y.clone()), bias


class Experts(SequentialMLP):
    """This rank's experts, one after the other."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        **names: Any,  # noqa: ANN401 - from Megatron-Core 0.18 on: `name`, for its base class
    ) -> None:
        own = copy.copy(config)
        own.ffn_hidden_size = config.moe_ffn_hidden_size
        own.sequence_parallel = False  # the dispatcher brings whole tokens, and no rank has more of them
        super().__init__(num_local_experts, own, submodules, pg_collection, **names)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """([tokens, hidden], no bias) of tokens sorted by expert, [tokens, hidden], each with its weight, [tokens].

        `tokens_per_expert` is int64 [experts]; an expert without tokens is left out. A rank without any still returns
        what depends on tokens and weights: its part in the collectives of the dispatcher's backward pass.
        """
        counts = tokens_per_expert.tolist()
        given = zip(self.local_experts, tokens.split(counts), probs.split(counts), strict=True)
        outputs = [expert(its_tokens, its_probs)[0] for expert, its_tokens, its_probs in given if len(its_tokens)]
        return torch.cat(outputs) if outputs else tokens * probs.unsqueeze(-1).to(tokens.dtype), None


def mixture_spec() -> ModuleSpec:
    """The mixture in place of a layer's MLP."""
    linears = MLPSubmodules(linear_fc1=GatedLinear, linear_fc2=ExpertDown)
    experts = ModuleSpec(module=Experts, submodules=linears)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, router=Router))


def mixture_settings(model: Model, parallel: Parallel) -> dict[str, Any]:
    """What Megatron-Core's configuration says of the mixture; empty where there is none."""
    if model.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_ffn_hidden_size": model.mlp_width,
        "moe_router_topk": model.moe_router_topk,
        # With one expert a token, a softmax over the chosen would be 1 whatever the router says.
        "moe_router_pre_softmax": model.moe_router_topk == 1,
        "moe_router_load_balancing_type": "aux_loss" if model.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_token_dispatcher_type": TOKEN_DISPATCHER,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": 1,
    }


def average_expert_tokens(recipe: Recipe, tokens: int) -> int:
    """Tokens of one expert in one pass, if all experts get the same; `tokens` are those of a micro-batch.

    The ranks of an expert-parallel group bring their tokens, tensor-parallel ones a share of a micro-batch each.
    """
    model, parallel = recipe.model, recipe.parallel
    if model.num_moe_experts is None:
        return tokens
    return max(1, tokens * parallel.expert * model.moe_router_topk // (parallel.tensor * model.num_moe_experts))


def globally_numbered(name: str, mlp: nn.Module) -> str:
    """A name with the expert's number among all experts; Megatron-Core's counts those of a rank. Others as they are."""
    before, marker, after = name.partition(EXPERTS)
    if not marker or not isinstance(mlp, MoELayer):
        return name
    local, _, rest = after.partition(".")
    return f"{before}{marker}{mlp.local_expert_indices[int(local)]}.{rest}"
