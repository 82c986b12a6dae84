"""The layouts of a number of devices that a recipe can be trained at: feasible, within memory, ranked by tokens/s."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sbn.config import Recipe
from megatron_sbn.config.validation import validate_recipe, validate_world_size
from megatron_sbn.errors import RecipeError
from megatron_sbn.plan.hardware import Device, Efficiency
from megatron_sbn.plan.memory import RankMemory, worst_rank
from megatron_sbn.plan.shapes import Layout
from megatron_sbn.plan.step_time import Duration, duration

_OF_ONE_PIPELINE = ("virtual_pipeline", "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_LARGEST_MICRO_BATCH = 64
_AS_FAST = 1.02


@dataclass(frozen=True)
class Candidate:
    """A layout with what it takes."""

    layout: Layout
    memory: RankMemory
    duration: Duration

    @property
    def name(self) -> str:
        """TP x PP x DP and what else differs, as overrides of the recipe would say it."""
        layout, parallel = self.layout, self.layout.recipe.parallel
        expert = f" EP{layout.expert}" if layout.expert > 1 else ""
        return f"TP{layout.tensor} PP{layout.pipeline} DP{layout.data}{expert} ZeRO-{parallel.zero_stage}"


@dataclass(frozen=True)
class Choice:
    """Layouts that fit, the fastest first, and those that do not, by how much; bytes."""

    fitting: tuple[Candidate, ...]
    too_large: tuple[tuple[float, Candidate], ...]  # (bytes over the memory, layout), the closest first


@dataclass(frozen=True)
class Machines:
    """What a plan is for."""

    device: Device
    nodes: int
    per_node: int
    assumed: Efficiency

    @property
    def devices(self) -> int:
        """Of all nodes."""
        return self.nodes * self.per_node

    @property
    def usable(self) -> float:
        """Bytes of a device's memory that a plan may fill."""
        return self.device.memory - self.device.reserve


def candidate(recipe: Recipe, machines: Machines) -> Candidate:
    """The recipe's own layout. Raises RecipeError where the devices do not fill it."""
    validate_world_size(recipe, machines.devices)
    layout = Layout(recipe, machines.devices)
    taken = worst_rank(layout, machines.device.keeps)
    return Candidate(layout, taken, duration(layout, machines.device, machines.per_node, machines.assumed))


def choose(recipe: Recipe, machines: Machines) -> Choice:
    """Every tensor x pipeline x ZeRO stage, with everything else as the recipe has it; and its micro-batch size.

    Of that, the smallest whose step is at most 2% longer than the fastest: a larger one costs memory for nothing.
    ZeRO-2 is not looked at beside ZeRO-1, unless the recipe has it: gradients are whole until the end of the step, so
    both take the same memory and send the same bytes.
    """
    fitting: dict[str, list[Candidate]] = {}
    too_large: dict[str, tuple[float, Candidate]] = {}
    for variant in _variants(recipe, machines):
        try:
            validate_recipe(variant)
            found = candidate(variant, machines)
        except RecipeError:
            continue
        name, over = found.name, found.memory.total - machines.usable
        if over > 0:
            too_large[name] = min(too_large.get(name, (over, found)), (over, found), key=lambda pair: pair[0])
        else:
            fitting.setdefault(name, []).append(found)
    ranked = sorted(
        (_smallest_of_fastest(found) for found in fitting.values()),
        key=lambda one: (one.duration.step, one.memory.total),
    )
    left = sorted((pair for name, pair in too_large.items() if name not in fitting), key=lambda pair: pair[0])
    return Choice(tuple(ranked), tuple(left))


def _smallest_of_fastest(found: list[Candidate]) -> Candidate:
    limit = _AS_FAST * min(one.duration.step for one in found)
    return min((one for one in found if one.duration.step <= limit), key=lambda one: one.memory.total)


def _variants(recipe: Recipe, machines: Machines) -> Iterator[Recipe]:
    """Tensor-parallel groups stay in a node; uneven stages are the recipe's own business and are left out."""
    parallel = recipe.parallel
    sizes = {recipe.training.micro_batch_size}
    while max(sizes) < _LARGEST_MICRO_BATCH:
        sizes.add(2 * max(sizes))
    sizes |= {size for size in (1, 2, 4) if size < min(sizes)}
    stages = (2, 3) if parallel.zero_stage == 2 else (1, 3)
    for tensor in _divisors(machines.per_node):
        for pipeline in _divisors(machines.devices // tensor):
            own = (parallel.tensor, parallel.pipeline) == (tensor, pipeline)
            changes: dict[str, int | None] = {"tensor": tensor, "pipeline": pipeline}
            changes |= {} if own else dict.fromkeys(_OF_ONE_PIPELINE)
            for stage in stages:
                changed = parallel.model_copy(update=changes | {"zero_stage": stage})
                for size in sorted(sizes):
                    training = recipe.training.model_copy(update={"micro_batch_size": size})
                    yield recipe.model_copy(update={"parallel": changed, "training": training})


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
