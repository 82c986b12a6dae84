"""The recipe: its keys (schema), its files (yaml_file, sweep), what can be trained (validation), all three (load)."""

from megatron_sbn.config.linear import Linear, Phase
from megatron_sbn.config.load import check_no_password, load_recipe
from megatron_sbn.config.schema import (
    Checkpoint,
    Model,
    Name,
    Parallel,
    Recipe,
    Section,
    Stage,
    Training,
)

__all__ = [
    "Checkpoint",
    "Linear",
    "Model",
    "Name",
    "Parallel",
    "Phase",
    "Recipe",
    "Section",
    "Stage",
    "Training",
    "check_no_password",
    "load_recipe",
]
