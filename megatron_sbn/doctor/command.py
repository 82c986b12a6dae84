"""`sbn doctor RECIPE`: checks a recipe against its layout, and with --ranks against what the ranks really compute.

Without ranks nothing is started: the recipe is read, every combination that cannot be right is refused, what it
needs is printed, and its data is looked at (`data/data_check.py`). With them, one step of a tiny model of that very
layout (`tiny`) is compared with a single rank's, tensor by tensor; with --layouts, every layout of up to four ranks is;
with --engines, other releases of the engines are compared. What is compared needs no data.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_sbn.atomic_files import write_atomically
from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.config.validation import min_world_size, validate_world_size
from megatron_sbn.data.data_check import missing_files, warn_of_data
from megatron_sbn.doctor.engines import check_engines
from megatron_sbn.doctor.layouts import SPREAD, candidates, reference
from megatron_sbn.doctor.tiny_recipe import one_rank, tiny_recipe
from megatron_sbn.doctor.trials import run_trials
from megatron_sbn.engines import check_installed
from megatron_sbn.errors import RecipeError
from megatron_sbn.text_table import aligned

MOST_RANKS = 1 << 16  # that are tried
LAYOUT_STEPS, ENGINE_STEPS = 50, 4


def check(recipe: Recipe, ranks: int | None = None) -> None:
    """Prints what the recipe needs. Raises RecipeError unless `ranks` ranks, if given, fill its layout."""
    smallest = min_world_size(recipe)
    if ranks is not None:
        validate_world_size(recipe, ranks)
    parallel = recipe.parallel
    print(
        f"{recipe.name}: tensor {parallel.tensor} x pipeline {parallel.pipeline} x expert {parallel.expert}, "
        f"ZeRO-{parallel.zero_stage}; a replica takes {parallel.tensor * parallel.pipeline} ranks"
    )
    print(f"ranks that its batch of {recipe.training.global_batch_size} fills: {_counts(recipe, smallest)}")


def _counts(recipe: Recipe, smallest: int) -> str:
    """The numbers of ranks that can train the recipe, smallest first."""
    counts = []
    most = min(smallest * recipe.training.global_batch_size, max(smallest, MOST_RANKS))
    for ranks in range(smallest, most + 1, smallest):
        try:
            validate_world_size(recipe, ranks)
        except RecipeError:
            continue
        counts.append(str(ranks))
    if not counts:
        validate_world_size(recipe, smallest)
    return ", ".join(counts[:8]) + (", ..." if len(counts) > 8 else "")


def check_ranks(recipe: Recipe, ranks: int, json_file: Path | None = None) -> bool:
    """Runs a step on `ranks` ranks and on one, prints the comparison; returns whether all is equal."""
    from megatron_sbn.doctor import report

    data_size = ranks // (recipe.parallel.tensor * recipe.parallel.pipeline)
    tiny = tiny_recipe(recipe, data_size)
    trials = run_trials({"layout": (ranks, tiny), "single": (1, one_rank(tiny))}, steps=1)
    lines = report.compare(tiny, trials["layout"], trials["single"])
    print(f"{'':<8}{'tensors':>8}  {'largest difference':<20}sha256 of the first, on {ranks} ranks and on one")
    for kind in report.KINDS:
        worst = report.worst(lines, kind)
        if worst is not None:
            count = sum(line.name.rpartition(".")[2] == kind for line in lines)
            print(f"{kind:<8}{count:>8}  {report.verdict(worst):<20}{worst.ours[:16]}  {worst.theirs[:16]}")
    for line in lines[-2:]:
        print(f"{line.name:<18}{report.verdict(line):<20}{line.ours}  {line.theirs}")
    for line in lines:
        if not line.equal:
            print(f"differs: {line.name} by {line.difference:.2e}, at most {line.limit:g} is expected")
    for name, volume in trials["layout"].comm_bytes.items():
        if volume:
            group, kind = name.split(".")
            print(f"communication volume of all ranks in a step: {volume:>12,.0f} bytes  {group:<9}{kind}")
    if json_file is not None:
        write_atomically(json_file, json.dumps(report.as_json(lines, trials["layout"]), indent=2).encode() + b"\n")
    return all(line.equal for line in lines)


def check_layouts(recipe: Recipe, steps: int, json_file: Path | None = None) -> bool:
    """Prints the table layout x {codes, tokens, hidden states, loss, gradient norm, bytes} beside one rank."""
    from megatron_sbn.doctor import report

    wide = reference(recipe)
    by_name = candidates(recipe)
    trials = run_trials({"single": (1, wide), **by_name}, steps)
    single = trials.pop("single")
    print(f"{recipe.name}: a tiny model under every layout of up to four ranks, {steps} steps, beside one rank")
    ends = (f"loss at {steps}", "from one rank", "bytes a step")
    header = ("layout", "codes", "x_q", "hidden", "loss at 1", "grad norm", *ends)
    last = single.losses[-1]
    rows: list[tuple[str, ...]] = [("one rank", *("",) * 5, f"{last:.6f}", "", "")]
    results, equal = {}, True
    for name, trial in trials.items():
        lines = report.compare(by_name[name][1], trial, single)
        columns = [report.verdict(report.worst(lines, kind)) for kind in ("codes", "x_q", "hidden")]
        columns += [report.verdict(line) for line in lines[-2:]]
        off, volume = abs(trial.losses[-1] - last), sum(trial.comm_bytes.values())
        rows.append((name, *columns, f"{trial.losses[-1]:.6f}", f"{off:.1e}", f"{volume:,.0f}"))
        equal = equal and all(line.equal for line in lines)
        results[name] = report.as_json(lines, trial) | {"losses": trial.losses, "grad_norms": trial.grad_norms}
    print("\n".join(aligned(header, rows)))
    print(f"({SPREAD}: what rounding alone does to a run; codes, x_q and hidden states are those of the first step)")
    if json_file is not None:
        write_atomically(json_file, json.dumps(results, indent=2).encode() + b"\n")
    return equal


def run(
    path: str,
    overrides: list[str],
    *,
    ranks: int | None = None,
    layouts: bool = False,
    engines: Sequence[str] = (),
    steps: int | None = None,
    json_file: Path | None = None,
) -> int:
    """The command; returns its exit status: 0 equal, 1 different, 2 a bad recipe."""
    compared = [ranks is not None, layouts, bool(engines)].count(True)
    if json_file is not None and compared != 1:
        raise RecipeError(f"--json {json_file} takes the comparison of --ranks, --layouts or --engines; give one")
    if steps is not None and not layouts and not engines:
        raise RecipeError(f"--steps {steps} goes with --layouts or --engines; give one of them, or leave it out")
    if engines and steps == 1:
        raise RecipeError("--steps 1: --engines resumes from a checkpoint half-way; give it 2 or more")
    recipe = load_recipe(path, overrides)
    if compared:
        check_installed()
    count = None if ranks is None else ranks or min_world_size(recipe)
    check(recipe, count)
    missing = missing_files(recipe) if compared else []
    for line in missing:  # comparisons read no data
        print(f"not there yet: {line}")
    if not missing:
        warn_of_data(recipe)
    equal = True
    if count is not None:
        equal = check_ranks(recipe, count, json_file)
    if layouts:
        equal = check_layouts(recipe, steps or LAYOUT_STEPS, json_file) and equal
    if engines:
        equal = check_engines(recipe, engines, steps or ENGINE_STEPS, json_file) and equal
    if compared:
        print("equal" if equal else "DIFFERENT")
    return 0 if equal else 1
