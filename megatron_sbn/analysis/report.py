"""`sbn report STUDY`: the runs of a study -> a page, a table and figures that answer "does it pay at this scale?".

    report/index.md         the page                    report/perplexity.png    over N:M, raw and normalized
    report/runs.csv         one line a run              report/loss.png          training loss over tokens
                                                        report/scaling.png       speed over ranks, if they vary

Reads recipe.yaml and metrics.jsonl of every run in the study's folder, or the study's runs in MLflow. Runs that have
not finished are in the table, marked, and not in the curves. A run with phases goes by its last one, and has a curve of
its own. A normalized perplexity is over the mean of the same format's N = M runs without phases; where it first exceeds
1.10, going down in N, the format has collapsed.
"""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from megatron_sbn.analysis.figures import (
    COLLAPSE,
    Curve,
    Scaling,
    Trace,
    loss_over_tokens,
    perplexity_over_sparsity,
    speed_over_ranks,
)
from megatron_sbn.atomic_files import make_folder, write_atomically
from megatron_sbn.errors import InputError
from megatron_sbn.redaction import one_line
from megatron_sbn.runs.finished_run import Run, read_run
from megatron_sbn.runs.folder import METRICS, TRACKING
from megatron_sbn.runs.tracking_record import read_record
from megatron_sbn.tracking.study import STUDY_TAG

COLUMNS = (
    *("run", "weight_format", "sparsity", "schedule", "seed", "steps", "tokens", "finished"),
    *("loss", "validation_perplexity", "zero_fraction", "flip_rate_cumulative", "tokens_per_second", "ranks"),
)
LONGEST_SETTING = 60  # characters of a legend's entry

# What results depend on, beside what a figure is over: seed and sparsity; ranks, batch and layout.
_OF_SPEED = re.compile(r"(model|linear)\..+|parallel\.(virtual_pipeline|sequence)")
_OF_PERPLEXITY = re.compile(
    r"(model|data|optimizer)\..+|linear\.(?!sparsity|backend|forward_form).+"
    r"|training\.(steps|global_batch_size|validation_samples)|start_from|start_with"
)


def read_study(folder: Path) -> list[Run]:
    """Runs of a folder, by name. Raises InputError where there is none."""
    found = [path.parent for path in sorted(folder.glob("*/recipe.yaml"))]
    runs = [read_run(path) for path in found if (path / METRICS).is_file()]
    if not runs:
        raise InputError(f"{folder}: holds no run folders (recipe.yaml and metrics.jsonl); name the folder of a study")
    return runs


def tracked_as(folder: Path) -> tuple[str, str]:
    """(tracking URI, name of the study) of a folder's runs, as their tracking.json has them. Raises InputError."""
    records = [read_record(path) for path in sorted(folder.glob(f"*/{TRACKING}"))]
    found = {(record.uri, record.tags[STUDY_TAG]) for record in records if STUDY_TAG in record.tags}
    way_out = "give the study's name, and --uri"
    if not found:
        raise InputError(f"{folder}: no run of it is tracked under a study (tracking.study); set that, and `sbn sync`")
    if len(found) > 1:
        studies = ", ".join(f"{name} at {uri}" for uri, name in sorted(found))
        raise InputError(f"{folder}: its runs are of several studies ({studies}); {way_out}")
    ((uri, name),) = found
    if "***" in uri:
        raise InputError(f"{folder}: its tracking URI {uri} lacks its password; {way_out}")
    return uri, name


def finished(run: Run) -> bool:
    """Whether the last step of the recipe was measured."""
    return bool(run.lines) and int(run.lines[-1]["step"]) >= run.recipe.training.steps


def curves(runs: Sequence[Run], group: int) -> list[Curve]:
    """Final validation perplexity of finished runs over N of N:`group`, seeds as ranges.

    One curve a format; several where its runs differ in more than seed and sparsity, each with what tells it apart.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        points = run.points("validation_perplexity")
        # The last step's own: a run that is read during its last validation has only one of before.
        if points and points[-1][0] >= run.recipe.training.steps and _is_drawn(run, group):
            found.setdefault(run.format_name, []).append(run)
    made = []
    for called, own in sorted(found.items(), reverse=True):
        by_setting: dict[tuple[str, str], dict[int, list[float]]] = {}
        for run, setting in zip(own, settings_of(own, _OF_PERPLEXITY), strict=True):
            n, m = run.sparsity
            by_n = by_setting.setdefault((setting, run.schedule), {})
            by_n.setdefault(group if n == m else n, []).append(run.points("validation_perplexity")[-1][1])
        weight_format = own[0].recipe.linear.final.weight_format
        for (setting, schedule), by_n in sorted(by_setting.items(), key=lambda item: item[0][1] != ""):
            order = sorted(by_n, reverse=True)
            spread = [by_n[n] for n in order]
            ranges = (tuple(map(mean, spread)), tuple(map(min, spread)), tuple(map(max, spread)))
            unphased = by_setting.get((setting, ""), {}).get(group)
            baseline = mean(unphased) if unphased else None
            made.append(Curve(weight_format, schedule or called, group, tuple(order), *ranges, setting, baseline))
    return made


def _is_drawn(run: Run, group: int) -> bool:
    """Whether its N:M has a place on the axis of N of N:`group`."""
    n, m = run.sparsity
    return m == group or n == m


def settings_of(runs: Sequence[Run], matters: re.Pattern[str]) -> list[str]:
    """Of every run, the keys that matter and are not the same in all, with their values at the end of its phases.

    Short enough for a legend: the last part of a key, unless two keys share it, and at most 24 characters of a value.
    What then is the same for runs that differ is told apart by the runs' names.
    """
    flat = [run.recipe.model_copy(update={"linear": run.recipe.linear.final}).flat() for run in runs]
    keys = [key for key in flat[0] if matters.fullmatch(key) and len({values[key] for values in flat}) > 1]
    last = [key.rpartition(".")[2] for key in keys]
    names = [key if last.count(end) > 1 else end for key, end in zip(keys, last, strict=True)]
    exact = [tuple(values[key] for key in keys) for values in flat]
    short = [", ".join(f"{name} {_short(value)}" for name, value in zip(names, own, strict=True)) for own in exact]
    if len(set(short)) == len(set(exact)) and all(len(text) <= LONGEST_SETTING for text in short):
        return short
    first = {own: run.name for own, run in reversed(list(zip(exact, runs, strict=True)))}
    return [f"as {first[own]}" for own in exact]


def _short(value: str) -> str:
    text = one_line(value)
    return text if len(text) <= 24 else f"{text[:10]}...{text[-10:]}"


def collapse_point(curve: Curve) -> int | None:
    """The largest N whose mean perplexity is over 1.10 of the dense one's; None if there is none, or no dense run."""
    scaled = curve.normalized()
    if scaled is None:
        return None
    return next((n for n, value in zip(scaled.n, scaled.mean, strict=True) if value > COLLAPSE), None)


def scalings(runs: Sequence[Run]) -> list[Scaling]:
    """Median tokens/s over ranks, for each layout that ran on several numbers of them; runs that share both: mean.

    Where models or formats differ too, each has its own layouts.
    """
    speeds: dict[str, dict[int, list[float]]] = {}
    for run, setting in zip(runs, settings_of(runs, _OF_SPEED), strict=True):
        measured = [value for _, value in run.points("tokens_per_second")]
        if measured and run.ranks is not None:
            parallel = run.recipe.parallel
            layout = f"tensor {parallel.tensor} x pipeline {parallel.pipeline}, ZeRO-{parallel.zero_stage}"
            layout = ", ".join(filter(None, (layout, run.schedule, setting)))
            speeds.setdefault(layout, {}).setdefault(run.ranks, []).append(median(measured))
    return [
        Scaling(layout, tuple(sorted(by_ranks)), tuple(mean(by_ranks[ranks]) for ranks in sorted(by_ranks)))
        for layout, by_ranks in sorted(speeds.items())
        if len(by_ranks) > 1
    ]


def write_report(name: str, runs: Sequence[Run], output: Path) -> list[Path]:
    """Writes the page, the table and the figures of a study's runs; returns their paths."""
    make_folder(output)
    written = [output / "index.md", output / "runs.csv"]
    group = max((m for run in runs for n, m in [run.sparsity] if n < m), default=8)
    made = curves(runs, group)
    page = [f"# {name}", "", *_summary(runs, group)]
    if made:
        written.append(output / "perplexity.png")
        perplexity_over_sparsity(made, group, written[-1])
        page += ["", "## Perplexity over sparsity", "", "![perplexity over N:M](perplexity.png)", ""]
        page += _table(made, group)
    measured = [(run, [(run.tokens(step), value) for step, value in run.points("loss")]) for run in runs]
    traces = [
        Trace(run.format_name, run.sparsity, run.schedule, run.recipe.training.global_batch_size, tuple(points))
        for run, points in measured
        if points
    ]
    if traces:
        written.append(output / "loss.png")
        loss_over_tokens(traces, written[-1])
        page += ["", "## Training loss", "", "![training loss over tokens](loss.png)"]
    layouts = scalings(runs)
    if layouts:
        written.append(output / "scaling.png")
        speed_over_ranks(layouts, written[-1])
        page += ["", "## Speed over ranks", "", "![tokens per second over ranks](scaling.png)", ""]
        page += _scaling_table(layouts)
    page += ["", "Every run: [runs.csv](runs.csv). Metrics are defined in docs/metrics.md."]
    write_atomically(output / "runs.csv", runs_csv(runs).encode())
    write_atomically(output / "index.md", ("\n".join(page) + "\n").encode())
    return written


def _summary(runs: Sequence[Run], group: int) -> list[str]:
    ended = [run for run in runs if finished(run)]
    tokens = sorted({int(run.tokens(run.recipe.training.steps)) for run in runs})
    sizes = " or ".join(f"{count / 1e6:.3g}M" for count in tokens)
    lines = [f"{len(runs)} runs, {len(ended)} finished; {sizes} tokens each."]
    lines += [f"Not finished: {run.name}." for run in runs if run not in ended]
    for run in ended:
        if not run.points("validation_perplexity"):
            lines.append(f"Not in the curves, as it has no validation: {run.name}.")
        elif not _is_drawn(run, group):
            lines.append(
                f"Not in the curves, which are over N of N:{group}: {run.name} ({run.recipe.linear.final.label})."
            )
    return lines


def _table(made: Sequence[Curve], group: int) -> list[str]:
    """Markdown: a line for each N, two columns a format, and the collapse points."""
    order = sorted({n for curve in made for n in curve.n}, reverse=True)
    header = "| N:M | " + " | ".join(f"{curve.name} | / {group}:{group}" for curve in made) + " |"
    lines = [header, "|---|" + "---:|---:|" * len(made)]
    for n in order:
        cells = []
        for curve in made:
            raw, scaled = (dict(zip(c.n, c.mean, strict=True)) if c else {} for c in (curve, curve.normalized()))
            cells += [f"{raw[n]:.2f}" if n in raw else "-", f"{scaled[n]:.3f}" if n in scaled else "-"]
        lines.append(f"| {n}:{group} | " + " | ".join(cells) + " |")
    lines.append("")
    for curve in made:
        point = collapse_point(curve)
        where = f"at {point}:{group}" if point is not None else "nowhere in this study"
        finding = f"perplexity first exceeds {COLLAPSE:.2f} of {group}:{group} {where}"
        if curve.normalized() is None:
            finding = f"no finished run at {group}:{group} without phases, so nothing to tell a collapse by"
        lines.append(f"- {curve.name}: {finding}.")
    return lines


def _scaling_table(layouts: Sequence[Scaling]) -> list[str]:
    """Markdown: a line for each layout and number of ranks."""
    lines = ["| layout | ranks | tokens/s | tokens/s a rank | efficiency |", "|---|---:|---:|---:|---:|"]
    for layout in layouts:
        for ranks, speed, share in zip(layout.ranks, layout.tokens_per_second, layout.efficiency, strict=True):
            lines.append(f"| {layout.layout} | {ranks} | {speed:,.0f} | {speed / ranks:,.0f} | {share:.0%} |")
    return lines


def runs_csv(runs: Sequence[Run]) -> str:
    """One line a run, with a header: COLUMNS."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        steps = int(run.lines[-1]["step"]) if run.lines else 0
        final = run.recipe.linear.final
        format_and_sparsity = (final.weight_format, "{}:{}".format(*final.sparsity), run.schedule)
        known = (run.name, *format_and_sparsity, run.recipe.training.seed)
        measured = [_last(run, name) for name in COLUMNS[8:12]]
        speeds = [value for _, value in run.points("tokens_per_second")]
        speed = f"{median(speeds):.1f}" if speeds else ""
        writer.writerow((*known, steps, int(run.tokens(steps)), finished(run), *measured, speed, run.ranks or ""))
    return text.getvalue()


def _last(run: Run, metric: str) -> str:
    points = run.points(metric)
    return repr(points[-1][1]) if points else ""
