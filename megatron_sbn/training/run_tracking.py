"""A run's MLflow tracker, from what the loop knows of the run. Made on rank 0 only."""

from pathlib import Path

from megatron_sbn.atomic_files import write_atomically
from megatron_sbn.config import Recipe
from megatron_sbn.data.index_header import shard_digest
from megatron_sbn.parallel.state import ParallelState
from megatron_sbn.runs.folder import RunFolder
from megatron_sbn.runs.provenance import batch_scripts, describe_environment, installed_packages
from megatron_sbn.runs.tracking_record import DatasetRecord
from megatron_sbn.tracking.destination import destination
from megatron_sbn.tracking.tags import describe_recipe
from megatron_sbn.tracking.tracker import Tracker


def start_tracker(recipe: Recipe, parallel: ParallelState, folder: RunFolder, run_id: str | None) -> Tracker | None:
    """The tracker; None on other ranks, and where tracking is off. `run_id` is MLflow's, as the checkpoint knows it."""
    if parallel.rank != 0 or not recipe.tracking.enabled:
        return None
    tags = (
        describe_environment()
        | describe_recipe(recipe, parallel.world_size)
        | {
            "layout": parallel.describe(),
            "run_folder": str(folder.path.resolve()),
        }
        | ({"start_from": f"{folder.start_from}, {recipe.start_with}"} if folder.start_from else {})
    )
    write_atomically(folder.environment, installed_packages().encode())
    place = destination(recipe, folder.path)
    return Tracker(
        run_dir=folder.path,
        name=folder.path.name,
        experiment=place.experiment,
        uri=place.uri,
        params=recipe.flat(),
        tags=tags,
        run_id=run_id,
        datasets=_datasets(recipe),
        artifacts=[folder.recipe, folder.recipe_changes, folder.environment, *batch_scripts()],
    )


def _datasets(recipe: Recipe) -> list[DatasetRecord]:
    """What the run reads, each shard by its digest."""
    shards = [(shard, "training") for shard in recipe.data.train]
    shards += [(shard, "validation") for shard in recipe.data.validation or ()]
    return [
        DatasetRecord(Path(shard.path).name, shard_digest(shard.path), str(Path(shard.path).absolute()), context)
        for shard, context in shards
    ]
