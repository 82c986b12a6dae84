"""The ways of cutting a tiny model over at most four ranks, for a table of all of them beside one rank."""

from megatron_sbn.config import Recipe
from megatron_sbn.config.validation import validate_recipe, validate_world_size
from megatron_sbn.doctor.tiny_recipe import MICRO_BATCH, one_rank, tiny_recipe
from megatron_sbn.errors import RecipeError

MAX_RANKS = 4
_LAYOUTS: dict[str, tuple[int, dict[str, object], dict[str, object]]] = {
    "tensor 2": (2, {"tensor": 2}, {}),
    "tensor 2, whole sequence": (2, {"tensor": 2, "sequence": False}, {}),
    "tensor 4": (4, {"tensor": 4}, {}),
    "pipeline 2": (2, {"pipeline": 2}, {}),
    "pipeline 2, interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "pipeline 2, 3 layers and 1": (2, {"pipeline": 2, "num_layers_in_first_pipeline_stage": 3}, {}),
    "pipeline 4": (4, {"pipeline": 4}, {}),
    "data 2, ZeRO-1": (2, {"zero_stage": 1}, {}),
    "data 2, ZeRO-2": (2, {"zero_stage": 2}, {}),
    "data 2, ZeRO-3": (2, {"zero_stage": 3}, {}),
    "expert 2": (2, {"expert": 2}, {}),
    "tensor 2, pipeline 2": (4, {"tensor": 2, "pipeline": 2}, {}),
    "tensor 2, data 2, ZeRO-3": (4, {"tensor": 2, "zero_stage": 3}, {}),
    "pipeline 2, data 2, ZeRO-2": (4, {"pipeline": 2, "zero_stage": 2}, {}),
    "tensor 2, recomputed": (2, {"tensor": 2}, {"recompute_granularity": "full"}),
}
SPREAD = "one rank, smaller micro-batches"


def candidates(recipe: Recipe) -> dict[str, tuple[int, Recipe]]:
    """Ranks and recipe of every layout that the recipe's model can be sharded into; `SPREAD` is a single rank's."""
    widest = _wide(recipe)
    found = {SPREAD: (1, _changed(one_rank(widest), {}, {}, {"micro_batch_size": MICRO_BATCH // 2}))}
    for name, (ranks, parallel, model) in _LAYOUTS.items():
        if parallel.get("expert") and not recipe.model.num_moe_experts:
            continue
        try:
            changed = _changed(one_rank(widest), parallel, model, {})
            validate_recipe(changed)
            validate_world_size(changed, ranks)
        except RecipeError:
            continue
        found[name] = ranks, changed
    return found


def reference(recipe: Recipe) -> Recipe:
    """The single rank that all of them are compared with."""
    return one_rank(_wide(recipe))


def _wide(recipe: Recipe) -> Recipe:
    """A tiny model that four ranks can shard either way."""
    values = recipe.plain()
    values["parallel"] = {"tensor": MAX_RANKS}
    values["model"] |= {"num_query_groups": None}
    wide = tiny_recipe(Recipe.model_validate(values))
    return _changed(wide, {}, {"num_layers": MAX_RANKS}, {"global_batch_size": MAX_RANKS * MICRO_BATCH})


def _changed(
    recipe: Recipe, parallel: dict[str, object], model: dict[str, object], training: dict[str, object]
) -> Recipe:
    values = recipe.plain()
    for section, changes in (("parallel", parallel), ("model", model), ("training", training)):
        values[section] |= changes
    return Recipe.model_validate(values)
