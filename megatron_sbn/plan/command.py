"""`sbn plan`: prints what a recipe will take on some nodes, and the layouts that fit."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megatron_sbn.atomic_files import write_atomically
from megatron_sbn.config import Recipe
from megatron_sbn.errors import RecipeError
from megatron_sbn.plan.hardware import Efficiency, find_device
from megatron_sbn.plan.render import describe, gib, page
from megatron_sbn.plan.search import Candidate, Choice, Machines, candidate, choose

MOST_DEVICES = 1 << 20
_MOST_NODES = 1024  # looked at for a way out


def run(recipe: Recipe, machines: Machines, json_file: Path | None) -> int:
    """Prints the plan; returns 0. Raises RecipeError where no layout is feasible or fits, with what would."""
    choice = choose(recipe, machines)
    own, reason = _own(recipe, machines)
    if not choice.fitting:
        raise RecipeError(_way_out(recipe, machines, choice, reason))
    if own is None:
        print(f"The recipe's own layout is not possible: {reason}. The fastest that fits is shown instead.\n")
        own = choice.fitting[0]
    print(page(recipe, machines, own, choice))
    if json_file is not None:
        text = json.dumps(describe(recipe, machines, own, choice), indent=1) + "\n"
        write_atomically(json_file, text.encode())
    return 0


def machines_of(device: str, nodes: int, per_node: int, assumed: Sequence[str] = ()) -> Machines:
    """From the command's options. Raises RecipeError for an unknown device or assumption."""
    values = asdict(Efficiency())
    for text in assumed:
        name, _, share = text.partition("=")
        if name not in values:
            raise RecipeError(f"--assume {text}: {name!r} is not known; choose one of {', '.join(values)}")
        try:
            values[name] = float(share)
        except ValueError:
            raise RecipeError(f"--assume {text}: {share!r} is no number; write {name}=0.5") from None
        if not 0 < values[name] <= 1:
            raise RecipeError(f"--assume {text}: a share is above 0 and at most 1; write {name}=0.5")
    if nodes * per_node > MOST_DEVICES:
        raise RecipeError(f"--nodes {nodes} with {per_node} devices each: more than {MOST_DEVICES:,}; give fewer")
    return Machines(find_device(device), nodes, per_node, Efficiency(**values))


def _own(recipe: Recipe, machines: Machines) -> tuple[Candidate | None, str]:
    """The recipe's own layout, or why the devices cannot have it."""
    try:
        return candidate(recipe, machines), ""
    except RecipeError as error:
        return None, str(error)


def _way_out(recipe: Recipe, machines: Machines, choice: Choice, reason: str) -> str:
    """One line: what is lacking, and the smallest of the changes looked at that helps."""
    start = f"{recipe.name} on {machines.devices} {machines.device.name}"
    if not choice.too_large:
        return f"{start}: no layout is possible: {reason or 'none divides model and batch'}"
    over, nearest = choice.too_large[0]
    lacking = f"{start}: does not fit; the nearest layout, {nearest.name}, lacks {gib(over)} GiB a device"
    alone = {
        "model.recompute_granularity=full": _with(recipe, recompute=True, offload=False),
        "optimizer.cpu_offload=true": _with(recipe, recompute=False, offload=True),
    }
    helps = [name for name, changed in alone.items() if changed != recipe and choose(changed, machines).fitting]
    if not helps and choose(_with(recipe, recompute=True, offload=True), machines).fitting:
        helps = [" with ".join(alone)]
    nodes = 2 * machines.nodes
    while nodes <= _MOST_NODES and not choose(recipe, replace(machines, nodes=nodes)).fitting:
        nodes *= 2
    helps += [f"--nodes {nodes}"] if nodes <= _MOST_NODES else []
    return f"{lacking}; {' or '.join(helps)} would fit" if helps else f"{lacking}, and no change looked at helps"


def _with(recipe: Recipe, recompute: bool, offload: bool) -> Recipe:
    model = recipe.model.model_copy(update={"recompute_granularity": "full"} if recompute else {})
    optimizer = recipe.optimizer.model_copy(update={"cpu_offload": True} if offload else {})
    return recipe.model_copy(update={"model": model, "optimizer": optimizer})
