"""Learning rate and weight decay as pure functions of the step, so that nothing about them needs saving.

Default (docs/method.md, "Training"): linear warm-up to `lr`, then cosine (or linear) down to `min_lr` at
`lr_decay_steps`; weight decay constant for dense models, and for ternary ones cosine to 0 over the first half of
training. `stages` replaces both, each stage with its own lr, end_lr and weight decay (BitNet b1.58 2B4T uses two).
"""

import math
from itertools import pairwise

from megatron_sbn.config import Recipe, Stage


def learning_rate(recipe: Recipe, step: int) -> float:
    """lr of optimizer step `step` (the first step is 0 and already has a part of the warm-up)."""
    optimizer = recipe.optimizer
    warmup = optimizer.warmup_steps(recipe.training.steps)
    if step < warmup:
        peak = optimizer.stages[0].lr if optimizer.stages else optimizer.lr
        return peak * (step + 1) / warmup
    if optimizer.stages:
        stage, end = _stage_at(recipe, step)
        begin = max(stage.step, warmup)
        progress = (step - begin) / max(1, end - begin)
        return _decayed(stage.lr, stage.end_lr, progress, optimizer.lr_decay_style)
    decay_steps = optimizer.decay_steps(recipe.training.steps)
    progress = (step - warmup) / max(1, decay_steps - warmup)
    return _decayed(optimizer.lr, optimizer.min_lr, progress, optimizer.lr_decay_style)


def describe(recipe: Recipe) -> str:
    """The learning rate's schedule in words."""
    optimizer, steps = recipe.optimizer, recipe.training.steps
    warmup, decay = optimizer.warmup_steps(steps), optimizer.decay_steps(steps)
    begins = f"{warmup} warm-up steps, then " if warmup else ""
    if optimizer.stages:
        return f"{begins}{len(optimizer.stages)} stages from steps {', '.join(str(s.step) for s in optimizer.stages)}"
    if optimizer.lr_decay_style == "constant":
        return f"{begins}{optimizer.lr:.3g}"
    words = f"{begins}{optimizer.lr_decay_style} from {optimizer.lr:.3g} to {optimizer.min_lr:.3g} at step {decay}"
    if decay < steps:
        words += f", and {optimizer.min_lr:.3g} for the last {steps - decay} steps (optimizer.lr_decay_steps = {decay})"
    if decay > steps:
        last = learning_rate(recipe, steps - 1)
        words += f"; this run ends before, at {last:.3g} (optimizer.lr_decay_steps = {decay})"
    return words


def weight_decay(recipe: Recipe, step: int) -> float:
    """Weight decay of optimizer step `step`, for the parameters that decay at all."""
    optimizer = recipe.optimizer
    if optimizer.stages:
        return _stage_at(recipe, step)[0].weight_decay
    style = optimizer.weight_decay_style
    if style == "auto":
        style = "cosine_to_zero" if recipe.linear.weight_format == "ternary" else "constant"
    if style == "constant":
        return optimizer.weight_decay
    half = optimizer.decay_steps(recipe.training.steps) / 2
    return _decayed(optimizer.weight_decay, 0.0, step / half, "cosine")


def _decayed(start: float, end: float, progress: float, style: str) -> float:
    """From `start` to `end` as progress goes from 0 to 1; `end` afterwards."""
    progress = min(1.0, max(0.0, progress))
    if style == "constant":
        return start
    share = 1 - progress if style == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return end + (start - end) * share


def _stage_at(recipe: Recipe, step: int) -> tuple[Stage, int]:
    """The stage in force at a step, and the step where the next begins (the last lasts to the end of training)."""
    stages = recipe.optimizer.stages
    last = stages[-1]
    for stage, following in pairwise(stages):
        if step < following.step:
            return stage, following.step
    return last, max(recipe.training.steps, last.step + 1)
