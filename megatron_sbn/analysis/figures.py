"""Figures of a study: perplexity over sparsity, loss over tokens, speed over ranks. The only importer of matplotlib.

Colours of the formats are the same in every figure (blue ternary, orange dense) and differ in lightness too, so that
they survive a grey print; seeds are a band from the lowest to the highest around their mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

COLOURS = {"ternary": "#1f5fa8", "dense": "#e07b1a"}
MARKERS = {"ternary": "o", "dense": "s"}
MORE_MARKERS = "D^v*PX"
LINES = ("-", "--", ":", "-.")
LONG_LABEL = 24  # characters: more do not fit beside another entry of a legend
COLLAPSE = 1.10
"""A model has collapsed where its perplexity is more than this many times that of its own dense run."""


@dataclass(frozen=True)
class Curve:
    """Perplexity of one format over N of N:M: means, lowest and highest over seeds, in the order of `n`.

    Attributes:
        weight_format: of its last phase. called: the same in the legend: ternary, dense BF16, or all phases.
        setting: tells it from other curves of the format; empty where there are none.
        baseline: mean perplexity of the N = M runs of its format and setting that had no phases; None: not run.
    """

    weight_format: str
    called: str
    group: int  # M
    n: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    setting: str = ""
    baseline: float | None = None

    @property
    def name(self) -> str:
        """Format and setting."""
        return f"{self.called}, {self.setting}" if self.setting else self.called

    def normalized(self) -> "Curve | None":
        """Over the baseline; None where that was not run."""
        unit = self.baseline
        if unit is None:
            return None
        mean, low, high = (tuple(value / unit for value in values) for values in (self.mean, self.low, self.high))
        return replace(self, mean=mean, low=low, high=high)


def perplexity_over_sparsity(curves: Sequence[Curve], group: int, path: Path) -> None:
    """Two panels: raw perplexity, and over each format's own N = M = `group`, with the collapse line."""
    figure, (raw, normalized) = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    own: dict[str, int] = {}  # curves of a format so far: those of one colour differ in dashes and markers
    for curve in curves:
        index = own.setdefault(curve.weight_format, 0)
        own[curve.weight_format] += 1
        _draw(raw, curve, index)
        scaled = curve.normalized()
        if scaled is not None:
            _draw(normalized, scaled, index)
    raw.set_ylabel("validation perplexity")
    normalized.set_ylabel(f"perplexity / that of {group}:{group}")
    normalized.axhline(COLLAPSE, color="0.4", linewidth=1, linestyle="--")
    normalized.annotate(
        f"collapse: +{COLLAPSE - 1:.0%}", (0.02, COLLAPSE), xycoords=("axes fraction", "data"), va="bottom", color="0.3"
    )
    for axes in (raw, normalized):
        axes.set_xlabel(f"N of N:{group} (weights kept in every {group})")
        axes.set_xticks(range(min(min(curve.n) for curve in curves), group + 1))
        axes.invert_xaxis()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _legend_below(figure, raw)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw(axes: Any, curve: Curve, index: int) -> None:  # noqa: ANN401 - matplotlib's own
    """The format's curve number `index`: the first has filled markers, others hollow ones of other shapes."""
    colour = COLOURS.get(curve.weight_format, "0.3")
    style = {"color": colour, "linestyle": LINES[index % len(LINES)], "linewidth": 1.8, "label": curve.name}
    style["marker"] = MORE_MARKERS[(index - 1) % len(MORE_MARKERS)] if index else MARKERS.get(curve.weight_format, "x")
    if index:
        style["markerfacecolor"] = "white"
    axes.plot(curve.n, curve.mean, **style)
    axes.fill_between(curve.n, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)


def _legend_below(figure: Any, axes: Any) -> None:  # noqa: ANN401 - matplotlib's own
    """One legend for all panels, below them, where it covers no curve; long entries one a line."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    columns = 1 if max(map(len, labels)) > LONG_LABEL else min(3, len(labels))
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize="small", ncols=columns)


@dataclass(frozen=True)
class Trace:
    """Training loss of one run: (tokens, nats a token), with what tells it from others; `batch` in samples.

    `called` and `sparsity` are of its last phase; `schedule` has all phases, and is empty where there are none.
    """

    called: str
    sparsity: tuple[int, int]
    schedule: str
    batch: int
    points: tuple[tuple[float, float], ...]

    @property
    def setting(self) -> tuple[float, int, str]:
        """What has a shade of its own, in the order of the legend."""
        n, m = self.sparsity
        return -n / m, self.batch, self.schedule or f"{n}:{m}"


def loss_over_tokens(traces: Sequence[Trace], path: Path) -> None:
    """One panel a format on a common scale; a shade for each N:M and size of the batch, a line for each seed."""
    batches_differ = len({trace.batch for trace in traces}) > 1
    formats = sorted({trace.called for trace in traces}, reverse=True)
    size = (1.0 + 4.6 * len(formats), 4.4)
    figure, panels = plt.subplots(
        1, len(formats), figsize=size, sharex=True, sharey=True, squeeze=False, constrained_layout=True
    )
    colours = plt.get_cmap("viridis")
    for axes, called in zip(panels[0], formats, strict=True):
        own = [trace for trace in traces if trace.called == called]
        settings = sorted({trace.setting for trace in own})
        shades = {setting: colours(0.9 * i / max(1, len(settings) - 1)) for i, setting in enumerate(settings)}
        for trace in own:
            tokens, values = zip(*trace.points, strict=True)
            axes.plot([t / 1e6 for t in tokens], values, color=shades[trace.setting], linewidth=1.1)
        for setting, shade in shades.items():  # one entry for all seeds
            _, batch, sparsity = setting
            label = f"{sparsity}, batch {batch}" if batches_differ else sparsity
            axes.plot([], [], color=shade, linewidth=2, label=label)
        axes.set_title(called)
        axes.set_xlabel("tokens (millions)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        columns = 1 if any(len(setting[2]) > LONG_LABEL for setting in settings) else 2
        axes.legend(frameon=False, fontsize="small", ncols=columns, loc="upper right")
    panels[0][0].set_ylabel("training loss (nats / token)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@dataclass(frozen=True)
class Scaling:
    """Tokens/s of one layout over the number of ranks, in the order of `ranks`."""

    layout: str
    ranks: tuple[int, ...]
    tokens_per_second: tuple[float, ...]

    @property
    def efficiency(self) -> tuple[float, ...]:
        """Tokens/s a rank over that of the layout's fewest ranks."""
        each = [speed / ranks for ranks, speed in zip(self.ranks, self.tokens_per_second, strict=True)]
        return tuple(value / each[0] for value in each)


def speed_over_ranks(layouts: Sequence[Scaling], path: Path) -> None:
    """Two panels: tokens/s a rank, and the efficiency, a line for each layout."""
    figure, (speed, efficiency) = plt.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    markers = "os^Dv<>P"
    for index, layout in enumerate(layouts):
        style = {"marker": markers[index % len(markers)], "linewidth": 1.8, "color": f"C{index}"}
        each = [total / ranks for ranks, total in zip(layout.ranks, layout.tokens_per_second, strict=True)]
        speed.plot(layout.ranks, each, label=layout.layout, **style)
        efficiency.plot(layout.ranks, [100 * value for value in layout.efficiency], **style)
    speed.set_ylabel("tokens / s / rank")
    efficiency.set_ylabel("efficiency (% of the fewest ranks')")
    efficiency.axhline(100, color="0.4", linewidth=1, linestyle="--")
    counts = sorted({ranks for layout in layouts for ranks in layout.ranks})
    for axes in (speed, efficiency):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("ranks")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _legend_below(figure, speed)
    figure.savefig(path, dpi=150)
    plt.close(figure)
