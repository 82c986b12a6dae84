"""What a start changes in the recipe of a run that it continues: refused, said, or of no account.

Refused: what would make one run of two experiments (the model, the layers' format at steps that are done, the training
data, what decides which samples come next, another start_from, fewer steps than are done). Said, and kept in
recipe_changes.jsonl: everything else that changes what is computed. Of no account: where and how it is computed, saved
and tracked. Imports no torch.

    {"step": 40, "time": 1790000000.0, "changed": {"optimizer.lr": ["0.001", "0.0005"]}}
"""

import json
import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_sbn.config import Linear, Recipe
from megatron_sbn.errors import RecipeError
from megatron_sbn.redaction import one_line

WAY_OUT = "name another run_dir (start_from={run} start_with=weights begins it with these weights)"
_OF_THE_ORDER = ("training.seed", "training.global_batch_size", "model.seq_length")
_OF_NO_ACCOUNT = (
    *("name", "run_dir", "device", "start_from", "start_with", "parallel.", "checkpoint.", "tracking."),
    *("model.recompute_granularity", "model.init_method_std", "linear.backend", "linear.forward_form"),
    *("optimizer.cpu_offload", "training.micro_batch_size", "training.log_interval", "training.time_limit"),
    *("training.hang_", "training.rank_check_interval", "training.telemetry_interval", "data.tokenizer"),
    *("training.profile",),
)
_FORMAT = ("weight_format", "sparsity", "activation_bits", "order", "mask_source")


def earlier_recipe(path: Path) -> Recipe | None:
    """The recipe of the run's last start; None where it cannot be read by this version."""
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError, RecursionError, RecipeError):
        return None


def changed_keys(was: Recipe, now: Recipe) -> dict[str, tuple[str, str]]:
    """Keys that count and their (earlier, present) values as text."""
    before, after = (_flat(own.plain()) | {"linear.phases": own.linear.schedule or "none"} for own in (was, now))
    keys = [key for key in after if before.get(key) != after[key]] + [key for key in before if key not in after]
    return {key: (_text(before.get(key)), _text(after.get(key))) for key in keys if not key.startswith(_OF_NO_ACCOUNT)}


def check_changes(was: Recipe, now: Recipe, done: int, run: Path) -> dict[str, tuple[str, str]]:
    """`changed_keys` of a run of `done` steps. Raises RecipeError for one that may not change."""
    changed = changed_keys(was, now)
    way_out = WAY_OUT.format(run=run)
    check_steps(now, done, run)
    if now.start_from is not None and not same_start(was, now):
        raise RecipeError(
            f"start_from = {now.start_from}: {run} has done {done} steps and began from {was.start_from or 'nothing'}; "
            "leave it out to continue, or name another run_dir"
        )
    for key, (before, after) in changed.items():
        is_model = key.startswith("model.") and key not in ("model.bf16", "model.seq_length")
        if is_model or key == "data.train" or key in _OF_THE_ORDER:
            raise RecipeError(
                f"{key} was {one_line(before)} in {run}, which has done {done} steps, and is {one_line(after)}; set it "
                f"back, or {'name another run_dir' if is_model else way_out}"
            )
    for step in _steps_to_compare(was, now, done):
        for setting in _FORMAT:
            before, after = (_shown(recipe.linear.at(step), setting) for recipe in (was, now))
            if before != after:
                raise RecipeError(
                    f"linear.{setting} was {before} at step {step} of {run}, which has done {done} steps, and is "
                    f"{after}; set it back, change it from step {done} on with linear.phases, or {way_out}"
                )
    return changed


def check_steps(now: Recipe, done: int, run: Path) -> None:
    """Raises RecipeError where the run has done more steps than the recipe has."""
    if now.training.steps < done:
        raise RecipeError(
            f"training.steps = {now.training.steps}: {run} has done {done} steps already; set {done} or more, or "
            f"{WAY_OUT.format(run=run)}"
        )


def same_start(was: Recipe, now: Recipe) -> bool:
    """Whether both begin from the same checkpoint; the record has the step that RUN alone stood for."""
    if was.start_from is None or now.start_from is None:
        return was.start_from == now.start_from
    from_same = was.start_from == now.start_from or was.start_from.startswith(f"{now.start_from}@")
    return from_same and was.start_with == now.start_with


def describe(changed: dict[str, tuple[str, str]]) -> list[str]:
    """A line each: KEY: BEFORE -> AFTER."""
    return [f"{key}: {one_line(before)[:200]} -> {one_line(after)[:200]}" for key, (before, after) in changed.items()]


def keep_changes(path: Path, step: int, changed: dict[str, tuple[str, str]]) -> None:
    """Adds a line to recipe_changes.jsonl. Raises OSError."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "time": round(time.time(), 3), "changed": changed}) + "\n")


def _text(value: object) -> str:
    """A value as YAML has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _steps_to_compare(was: Recipe, now: Recipe, done: int) -> list[int]:
    begins = {phase.step for recipe in (was, now) for phase in recipe.linear.phases}
    return sorted(step for step in {0, *begins} if step < done)


def _shown(linear: Linear, setting: str) -> str:
    value = getattr(linear, setting)
    return f"{value[0]}:{value[1]}" if setting == "sparsity" else str(value)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
