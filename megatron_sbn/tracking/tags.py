"""Tags of a run by which MLflow filters and groups."""

from megatron_sbn.config import Recipe
from megatron_sbn.plan.shapes import model_parameters


def describe_recipe(recipe: Recipe, ranks: int) -> dict[str, str]:
    """Tags to filter and group runs by: run_kind, study, size, format, layout, tokens, seed.

    weight_format and sparsity are those of the last phase, of which the result is; `schedule` has all phases.
    """
    training, parallel, final = recipe.training, recipe.parallel, recipe.linear.final
    tags = {
        "run_kind": "run",
        "parameters": str(sum(model_parameters(recipe).values())),
        "weight_format": final.weight_format,
        "sparsity": "{}:{}".format(*final.sparsity),
        "backward": recipe.linear.backward,
        "activation_dtype": "bf16" if recipe.model.bf16 else "fp32",
        "parameter_dtype": recipe.optimizer.parameter_dtype,
        "ranks": str(ranks),
        "tensor": str(parallel.tensor),
        "pipeline": str(parallel.pipeline),
        "zero_stage": str(parallel.zero_stage),
        "tokens": str(training.steps * training.global_batch_size * recipe.model.seq_length),
        "seed": str(training.seed),
    }
    if recipe.linear.phases:
        tags["schedule"] = recipe.linear.schedule
    if recipe.tracking.study is not None:
        tags["study"] = recipe.tracking.study
    return tags
