"""Draws docs/images/quickstart.png from the two run folders and the unigram perplexity of a quickstart:

sbn quickstart training.validation_interval=15
python docs/images/quickstart.py runs/quickstart-ternary-6of8-TIME runs/quickstart-dense-bf16-TIME 708.7
"""

import math
import sys
from pathlib import Path

from megatron_sbn.analysis.figures import COLOURS, plt
from megatron_sbn.runs.finished_run import Run, read_run


def draw(ternary: Run, dense: Run, unigram: float, path: Path) -> None:
    """Loss of both over tokens, and the flip rate of the ternary masks; `unigram` is a perplexity."""
    figure, (loss, flips) = plt.subplots(
        1, 2, figsize=(9, 3.4), width_ratios=(3, 2), constrained_layout=True, facecolor="white"
    )
    for run, label, marker, width in ((dense, "dense BF16", "s", 4), (ternary, "ternary 6:8", "o", 1.8)):
        colour = COLOURS[run.recipe.linear.weight_format]
        steps, values = zip(*run.points("loss"), strict=True)
        loss.plot([run.tokens(s) / 1e6 for s in steps], values, color=colour, linewidth=0.9, alpha=0.4)
        steps, values = zip(*run.points("validation_loss"), strict=True)
        loss.plot(
            [run.tokens(s) / 1e6 for s in steps], values, color=colour, marker=marker, linewidth=width, label=label
        )
    loss.axhline(math.log(unigram), color="0.4", linewidth=1, linestyle="--")
    loss.annotate("unigram", (0.19, math.log(unigram)), va="bottom", ha="right", color="0.3", fontsize="small")
    loss.set(xlabel="tokens (millions)", ylabel="nats / token", title="loss: thin training, dots validation")
    loss.legend(frameon=False)
    steps, values = zip(*run.points("flip_rate"), strict=True)
    flips.plot([run.tokens(s) / 1e6 for s in steps], [100 * v for v in values], color=COLOURS["ternary"], marker="o")
    flips.set(xlabel="tokens (millions)", ylabel="% of mask bits", title="mask bits flipped in 15 steps, ternary 6:8")
    flips.set_ylim(bottom=0)
    for axes in (loss, flips):
        axes.set_xticks([0, 0.05, 0.1, 0.15])
        axes.title.set_fontsize("medium")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    first, second = (read_run(Path(folder)) for folder in sys.argv[1:3])
    draw(first, second, float(sys.argv[3]), Path(__file__).with_suffix(".png"))
