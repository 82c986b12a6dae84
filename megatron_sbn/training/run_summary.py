"""What a run says about itself on rank 0: a summary at the start, and where everything is at the end.

Figures of the model and of memory are the plan's (`megatron_sbn/plan`). Passwords in URIs are masked.
"""

from pathlib import Path

from megatron_sbn.checkpoint.directory import newest
from megatron_sbn.config import Recipe
from megatron_sbn.data.passes import data_lines
from megatron_sbn.errors import InputError
from megatron_sbn.parallel.state import ParallelState
from megatron_sbn.plan.hardware import CPU, ON_CUDA
from megatron_sbn.plan.memory import worst_rank
from megatron_sbn.plan.shapes import Layout, model_parameters
from megatron_sbn.runs.folder import TRACKING, RunFolder
from megatron_sbn.runs.tracking_record import read_record
from megatron_sbn.text_table import count_text, size_text
from megatron_sbn.tracking.destination import destination
from megatron_sbn.training import schedule
from megatron_sbn.training.evaluate import Evaluator


def startup_summary(
    recipe: Recipe, parallel: ParallelState, folder: RunFolder, first: int, kernels: dict[str, str]
) -> list[str]:
    """Lines before the first step; `first` steps are done, `kernels` is `WeightQuantizer.kernels()`."""
    model, training = recipe.model, recipe.training
    begins = f"continues after step {first}" if first else "starts"
    if folder.start_from is not None:
        begins += f" with {recipe.start_with} of {folder.start_from}"
    kinds = model_parameters(recipe)
    each = training.global_batch_size * model.seq_length
    per_replica = training.global_batch_size // parallel.data.size // training.micro_batch_size
    tokens = f"{count_text(training.steps * each)} tokens in all, {count_text(each)} a step"
    extent = f"steps {first + 1} to {training.steps}, {tokens}"
    return [
        f"{recipe.name} {begins}: {count_text(sum(kinds.values()))} parameters; run folder {folder.path}",
        _row("model", ", ".join(f"{name} {count_text(count)}" for name, count in kinds.items() if count)),
        _row("layout", f"{parallel.describe()}, ZeRO-{recipe.parallel.zero_stage}"),
        _row(
            "batch", f"{per_replica} micro-batches of {training.micro_batch_size} x {model.seq_length} tokens a replica"
        ),
        _row("linear", _linear(recipe)),
        *([_row("phases", recipe.linear.schedule)] if recipe.linear.phases else []),
        *(_row("kernels", f"{layer}: {served}") for layer, served in kernels.items()),
        _row("tokens", extent),
        *(_row("data", line) for line in data_lines(recipe)),
        _row("lr", schedule.describe(recipe)),
        *(_row("changed", line) for line in folder.changed),
        _row("memory", _memory(recipe, parallel)),
        _row("saving", _saving(recipe, sum(kinds.values()))),
        _row("mlflow", mlflow_place(recipe, folder.path)),
    ]


def shutdown_summary(recipe: Recipe, folder: RunFolder, ended: str, evaluator: Evaluator | None = None) -> list[str]:
    """Lines after the last step: how it `ended`, the last validation if there was one, and where everything is."""
    saved = newest(folder.checkpoints)
    validation = evaluator.summary() if evaluator is not None else ""
    return [
        f"{ended}; run folder {folder.path}",
        *([_row("validation", validation)] if validation else []),
        _row("metrics", str(folder.metrics)),
        _row("checkpoint", "none" if saved is None else str(saved)),
        _row("mlflow", mlflow_place(recipe, folder.path)),
        *_mlflow_link(recipe, folder.path),
    ]


def mlflow_place(recipe: Recipe, run: Path) -> str:
    """Where MLflow has the run, or how it is opened there; secrets masked."""
    tracking = recipe.tracking
    if not tracking.enabled:
        return "off (tracking.enabled = false)"
    place = destination(recipe, run)
    return f"{place.open_command}, experiment {place.experiment}"


def _mlflow_link(recipe: Recipe, run: Path) -> list[str]:
    """Where the run list is in a browser, once MLflow has the run."""
    try:
        known = read_record(run / TRACKING).experiment_id if recipe.tracking.enabled else None
    except InputError:
        return []
    return [] if known is None else [_row("", destination(recipe, run).link(known))]


def _row(name: str, text: str) -> str:
    return f"  {name.ljust(11)}{text}"


def _linear(recipe: Recipe) -> str:
    linear = recipe.linear
    bits = "floating" if linear.activation_bits is None else f"{linear.activation_bits}-bit"
    ternary = f", {bits} activations, backward {linear.backward}" if linear.weight_format == "ternary" else ""
    between = "bf16" if recipe.model.bf16 else "fp32"
    return f"{linear.label}{ternary}; {between} between layers"


def _saving(recipe: Recipe, parameters: int) -> str:
    settings = recipe.checkpoint
    more = f", and every {settings.keep_every} for good" if settings.keep_every else ""
    size = size_text(12 * parameters)  # fp32 masters and both moments
    last = "after the last step" if settings.save_last else "where the run is stopped"
    if not settings.interval:
        return f"{size} {last} only (checkpoint.interval = 0)"
    return f"{size} every {settings.interval} steps and {last}, the newest {settings.keep} kept{more}"


def _memory(recipe: Recipe, parallel: ParallelState) -> str:
    layout = Layout(recipe, parallel.world_size)
    keeps = ON_CUDA if parallel.device.type == "cuda" else CPU.keeps
    most = worst_rank(layout, keeps)
    which = f" of stage {most.stage}" if layout.pipeline > 1 else ""
    return f"{size_text(most.total)} of tensors expected on a rank{which} at most (docs/plan.md)"
