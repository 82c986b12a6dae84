"""Which mixtures of experts can be trained; the rest is refused before anything is allocated, as in feasibility.py.

Each message is one line: the field, its value, and the fix. Imports no torch.
"""

from typing import TYPE_CHECKING

from megatron_sbn.errors import RecipeError

if TYPE_CHECKING:
    from megatron_sbn.config import Recipe


def check_experts(recipe: "Recipe") -> None:
    """Raises RecipeError unless the recipe's experts can be trained on some number of ranks."""
    model, parallel = recipe.model, recipe.parallel
    experts = model.num_moe_experts
    if experts is None:
        _check_without(recipe)
        return
    if model.moe_router_topk > experts:
        raise RecipeError(
            f"model.moe_router_topk = {model.moe_router_topk} is more than model.num_moe_experts = {experts}; "
            f"use at most {experts}"
        )
    if experts % parallel.expert:
        raise RecipeError(
            f"model.num_moe_experts = {experts} is not divisible by parallel.expert = {parallel.expert}; "
            f"use a multiple of {parallel.expert}, or a parallel.expert that divides {experts}"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        raise RecipeError(
            f"parallel.sequence = false with parallel.tensor = {parallel.tensor}: every rank would send the same "
            "tokens to the experts; set parallel.sequence=true, or parallel.tensor=1"
        )
    if parallel.zero_stage == 3:
        raise RecipeError(
            "parallel.zero_stage = 3 with model.num_moe_experts: an expert that sees no token would leave the others "
            "waiting in a gather; use parallel.zero_stage = 1 or 2"
        )
    if recipe.linear.sr_ste_decay > 0:
        raise RecipeError(
            f"linear.sr_ste_decay = {recipe.linear.sr_ste_decay}: it is added in every backward pass, and an expert "
            "without tokens has none; use 0 with model.num_moe_experts"
        )


def check_expert_world(recipe: "Recipe", world_size: int) -> None:
    """Raises RecipeError unless experts can be spread over `world_size` ranks, which fill the layout exactly."""
    parallel = recipe.parallel
    stage = world_size // parallel.pipeline
    if stage % parallel.expert:
        raise RecipeError(
            f"parallel.expert = {parallel.expert} does not divide the {stage} ranks of a pipeline stage "
            f"(tensor x data); start a multiple of {parallel.pipeline * parallel.expert} ranks or change it"
        )


def _check_without(recipe: "Recipe") -> None:
    """Settings of experts say nothing where there are none: refused, not ignored."""
    model = recipe.model
    if recipe.parallel.expert != 1:
        raise RecipeError(
            f"parallel.expert = {recipe.parallel.expert}: the model has no experts; use 1, or set model.num_moe_experts"
        )
    for field, value, default in (
        ("moe_router_topk", model.moe_router_topk, 2),
        ("moe_ffn_hidden_size", model.moe_ffn_hidden_size, None),
        ("moe_aux_loss_coeff", model.moe_aux_loss_coeff, 0.0),
    ):
        if value != default:
            raise RecipeError(f"model.{field} = {value} needs model.num_moe_experts; set it, or leave this out")
