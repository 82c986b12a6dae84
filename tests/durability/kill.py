"""Training runs are killed again and again and must end as if nothing had been.

    python tests/durability/kill.py --kills 100 --seed 1          # also `make kill`

A run of two ranks is killed with SIGKILL, one rank or all, at random and at chosen moments (watch.py, fire.py), started
again in the same run folder, and so on until it is let finish. Checked every time:

- a start goes on after the step that `latest` named when its predecessor died (the first checkpoint counts before
  `latest` names it), and no more steps are lost than were done since then: at most the checkpoint interval, and one
  interval more where a save was under way;
- the finished run's metrics.jsonl is an undisturbed run's, bit for bit, but for times and speeds;
- no more checkpoints are left than are kept, and at most one unfinished folder;
- where a file of the newest checkpoint is damaged after a kill (damage.py), the run goes on from the one before, and
  names the damaged one in its log;
- MLflow, where it is on, has every metric of every step once, with those values;
- with --change-layout every attempt has a layout of its own: losses are no further from the undisturbed run's than
  WITHIN times what undisturbed runs of these layouts are from each other. Sums in another order round otherwise.

The first run is shot at once at every kind of moment, the others at random. The seed decides what is aimed at; where a
shot in time hits is the machine's affair, so counts differ a little.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from damage import damage, newest_two
from fire import Attempt, FireError, Outcome, Shot, ask, fire, output
from watch import Ambush

STEPS, INTERVAL, KEEP = 24, 4, 2
VOCABULARY = 128
MOST_SHOTS = 6  # at one run
CLOCKED = ("time", "tokens_per_second", "model_flops_per_second_dense", "model_flops_per_second_sparse")


@dataclass(frozen=True)
class Layout:
    """Ranks, and the recipe keys that spread the model over them."""

    name: str
    ranks: int
    overrides: tuple[str, ...]


LAYOUTS = (Layout("tensor 2", 2, ("parallel.tensor=2",)),)
OTHERS = (
    Layout("pipeline 2", 2, ("parallel.pipeline=2",)),
    Layout("data 2, ZeRO-2", 2, ("parallel.zero_stage=2",)),
    Layout("data 2, ZeRO-3", 2, ("parallel.zero_stage=3",)),
    Layout("one rank", 1, ()),
)
WITHIN = 4.0
GENTLE = ("optimizer.lr=3e-4",)  # at the recipe's rate rounding grows to 1e-2 within a run


@dataclass
class Counts:
    """What has happened in a campaign."""

    moments: Counter[str] = field(default_factory=Counter)
    victims: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    resumes: int = 0
    lost: list[int] = field(default_factory=list)
    tracked: int = 0
    damaged: int = 0

    @property
    def kills(self) -> int:
        """Attempts that were killed."""
        return self.moments.total()


def write_recipe(folder: Path) -> Path:
    """A tiny recipe with all that keeps state from step to step: masks kept for some steps, telemetry, warm-up."""
    from megatron_sbn.data.shards import ShardWriter

    generator = np.random.default_rng(0)
    for name in ("tokens", "held-out"):
        writer = ShardWriter(folder / f"{name}.bin", folder / f"{name}.idx", VOCABULARY)
        for _ in range(50):
            writer.add(generator.integers(0, VOCABULARY, 100))
        writer.finish()
    path = folder / "tiny.yaml"
    path.write_text(
        f"""name: tiny
model: {{num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, num_query_groups: 2,
  seq_length: 16, vocab_size: {VOCABULARY}, bf16: false}}
linear: {{mask_interval: 3}}
data: {{train: {folder}/tokens, validation: {folder}/held-out}}
optimizer: {{lr: 6e-3, lr_warmup_steps: 2}}
training: {{steps: {STEPS}, global_batch_size: 4, micro_batch_size: 2, telemetry_interval: 2, validation_interval: 6,
  validation_samples: 4}}
checkpoint: {{interval: {INTERVAL}, keep: {KEEP}}}
tracking: {{uri: "sqlite:///{folder}/mlflow.db"}}
"""
    )
    return path


# One of every kind; the comment says what it leaves of the run.
EACH_MOMENT = (
    Shot((1,), 0.005, Ambush("step", 3, hold=False)),  # nothing is saved yet
    Shot((0, 1), 0.0, Ambush("save", 4, hold=True)),  # half a checkpoint, without another
    Shot((0,), 0.0, Ambush("latest", 1, hold=True)),  # a whole one that `latest` does not name
    Shot((1,), 0.0, Ambush("rename", 2, hold=True), gentle=True),  # rank 0 goes on alone
    Shot((0, 1), 0.0, Ambush("start", 6, hold=True)),  # a start that came to nothing
    Shot((0,), 0.0, Ambush("remove", 2, hold=True)),  # half of an old checkpoint
)


def draw_shot(draw: random.Random, ranks: int, seconds: float) -> Shot:
    """A moment and victims; `seconds` is what an undisturbed attempt takes."""
    one = draw.randrange(ranks)
    victims = tuple(range(ranks)) if draw.random() < 0.4 else (one,)
    gentle = draw.random() < 0.5
    # What is aimed at, how often it happens in one attempt at most, on which rank, and how often it is chosen.
    aims = (
        ("clock", 0, 0, 3),
        ("start", 30, 0, 3),
        ("step", 2 * INTERVAL, draw.randrange(ranks), 2),
        ("save", 36, 0, 4),
        ("save", 6, ranks - 1, 3),
        ("rename", 2, 0, 3),
        ("latest", 2, 0, 3),
        ("remove", 8, 0, 2),
    )
    kind, most, watched, _ = draw.choices(aims, weights=[aim[3] for aim in aims])[0]
    if kind == "clock":
        return Shot(victims, draw.uniform(0.0, seconds), gentle=gentle)
    # A step is hit somewhere in its middle; other events at the event itself, or soon after it.
    hold = kind != "step" and draw.random() < 0.7
    delay = 0.0 if hold else draw.uniform(0.0, 0.06 if kind == "step" else 0.02)
    return Shot(victims, delay, Ambush(kind, draw.randint(1, most), hold), watched, gentle)


@dataclass
class Expected:
    """How the next attempt has to begin: after which step, and which damaged checkpoint it has to tell of.

    `inode` is the damaged folder's, which distinguishes it from a new checkpoint of the same step.
    """

    step: int = 0
    damaged: str = ""
    inode: int = 0


class Campaign:
    """Runs under fire, in one folder, all with one recipe; with `damage` checkpoints are damaged too."""

    def __init__(
        self, folder: Path, seed: int, say: Callable[[str], None], damage: bool, layouts: Sequence[Layout] = LAYOUTS
    ) -> None:
        self.counts = Counts()
        self._layouts = layouts
        self._more = GENTLE if len(layouts) > 1 else ()
        self._folder = folder
        self._draw = random.Random(seed)
        self._say = say
        self._damage = damage
        self._recipe = write_recipe(folder)
        fire(self._attempt(folder / "warm-up", LAYOUTS[0], False))  # starts the server of the ranks
        began = time.monotonic()
        fire(self._attempt(folder / "undisturbed", LAYOUTS[0], False))
        self._seconds = time.monotonic() - began
        self._whole = comparable(folder / "undisturbed")
        self.spread = 0.0  # largest relative difference of a loss between undisturbed runs
        for number, layout in enumerate(layouts[1:]):
            fire(self._attempt(folder / f"undisturbed-{number}", layout, False))
            other = comparable(folder / f"undisturbed-{number}")
            self.spread = max(self.spread, apart(other, self._whole))

    def run(self, shots: Sequence[Shot | None], tracked: bool) -> None:
        """A training run under these shots (None: one at random), then let finish. Raises FireError if it is wrong."""
        run_dir = self._folder / f"run-{self.counts.runs:04d}"
        expected = Expected()
        events = []
        for number in range(len(shots) + 1):
            layout = self._layouts[0] if shots[0] else self._draw.choice(self._layouts)
            attempt = self._attempt(run_dir, layout, tracked)
            shot = None
            if number < len(shots):
                shot = shots[number] or draw_shot(self._draw, layout.ranks, self._seconds)
            outcome = fire(attempt, shot)
            self.counts.resumes += number > 0
            check_begin(attempt, outcome, expected)
            if shot is None or not outcome.moment:
                break
            expected = in_force(run_dir, expected)
            events.append(f"{outcome.moment} of {outcome.done}")
            self._count(attempt, shot, outcome, expected.step)
            if self._damage and not expected.damaged and self._draw.random() < 0.4:
                expected = self._damage_newest(run_dir, expected, events)
        self.counts.runs += 1
        self._say(f"{run_dir.name}{' (MLflow)' if tracked else ''}: {'; '.join(events) or 'not hit'}")
        check_finished(run_dir, self._whole, WITHIN * self.spread)
        if tracked:
            self.counts.tracked += 1
            complaint = ask(check_mlflow, str(run_dir), self._whole)
            if complaint:
                raise FireError(complaint)
        shutil.rmtree(run_dir)

    def _attempt(self, run_dir: Path, layout: Layout, tracked: bool) -> Attempt:
        overrides = (*layout.overrides, *self._more, f"tracking.enabled={str(tracked).lower()}")
        return Attempt(self._recipe, overrides, run_dir, layout.ranks, self._folder / "scratch")

    def _damage_newest(self, run_dir: Path, expected: Expected, events: list[str]) -> Expected:
        """Damages the newest checkpoint where there is one before it to go on from."""
        found = newest_two(run_dir / "checkpoints", expected.step)
        if found is None:
            return expected
        newest, before = found
        self.counts.damaged += 1
        events.append(damage(newest, self._draw))
        return Expected(before, newest.name, newest.stat().st_ino)

    def _count(self, attempt: Attempt, shot: Shot, outcome: Outcome, saved: int) -> None:
        self.counts.moments[outcome.moment] += 1
        self.counts.victims["all ranks" if len(shot.victims) == attempt.ranks else "one rank"] += 1
        self.counts.lost.append(check_lost(attempt.run_dir, outcome, saved))


def check_begin(attempt: Attempt, outcome: Outcome, expected: Expected) -> None:
    """Raises FireError where an attempt that came to a step did not begin as it had to."""
    if outcome.first is None:
        return
    if outcome.first != expected.step:
        raise FireError(
            f"{attempt.run_dir}: went on after step {outcome.first}, and the newest whole checkpoint was of step "
            f"{expected.step}\n{output(attempt)}"
        )
    if expected.damaged not in output(attempt):
        raise FireError(f"{attempt.run_dir}: no word of {expected.damaged}, which is damaged\n{output(attempt)}")


def check_lost(run_dir: Path, outcome: Outcome, saved: int) -> int:
    """How many steps have to be done again after a kill. Raises FireError for too many."""
    lost = max(0, outcome.done - saved)
    most = INTERVAL + (INTERVAL if outcome.saving else 0)
    if lost > most:
        raise FireError(
            f"{run_dir}: killed {outcome.moment} with {outcome.done} steps done, and the newest checkpoint is of step "
            f"{saved}: {lost} steps are lost, at most {most} may be"
        )
    return lost


def apart(found: Sequence[dict[str, float]], whole: Sequence[dict[str, float]]) -> float:
    """The largest relative difference of a loss at equal steps; infinite where steps are missing."""
    ours, theirs = ({line["step"]: line["loss"] for line in lines if "loss" in line} for lines in (found, whole))
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(abs(ours[step] - loss) / loss for step, loss in theirs.items())


def check_finished(run_dir: Path, whole: Sequence[dict[str, float]], tolerance: float = 0.0) -> None:
    """Raises FireError unless the run has the metrics of the `whole` one, and the checkpoints that it is to have.

    With a tolerance the losses alone are compared, within it.
    """
    found = comparable(run_dir)
    if tolerance and apart(found, whole) > tolerance:
        raise FireError(f"{run_dir}: a loss is {apart(found, whole):.1e} off, at most {tolerance:.1e} may be")
    if not tolerance and found != whole:
        where = next((f"{a} is not {b}" for a, b in zip(found, whole, strict=False) if a != b), "too few or many lines")
        raise FireError(f"{run_dir}/metrics.jsonl is not the undisturbed run's: {where}")
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    steps = [name for name in names if name.startswith("step-")]
    rest = [name for name in names if name not in steps and name != "latest"]
    if f"step-{STEPS:08d}" not in steps or len(steps) > KEEP + 1 or len(rest) > 1:
        raise FireError(f"{run_dir}/checkpoints holds {names}, and {KEEP} are to be kept")


def comparable(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock decides."""
    from megatron_sbn.runs.metrics_file import read_metrics

    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in read_metrics(run / "metrics.jsonl")]


def latest_step(run: Path) -> int:
    """The step of the checkpoint that `latest` names; without `latest`, of the only one that can be there, or 0."""
    folder = run / "checkpoints"
    try:
        name = (folder / "latest").read_text().strip()
    except FileNotFoundError:
        name = max((path.name for path in folder.glob("step-*")), default="step-0")
    return int(name.removeprefix("step-"))


def in_force(run: Path, before: Expected) -> Expected:
    """What the next attempt has to begin with after a kill, where `before` is what the killed one had to."""
    latest = latest_step(run)
    damaged = run / "checkpoints" / before.damaged
    if before.damaged and damaged.name == f"step-{latest:08d}":
        if not damaged.exists():  # killed between taking it away and putting the new one there
            return Expected(before.step)
        if damaged.stat().st_ino == before.inode:
            return before
    return Expected(latest)


def check_mlflow(run: str, expected: Sequence[dict[str, float]]) -> str:
    """What is wrong with what MLflow has of a finished run; "" for nothing. Runs in a process that has mlflow."""
    from mlflow import MlflowClient

    record = json.loads((Path(run) / "tracking.json").read_text())
    client = MlflowClient(record["uri"])
    for name in sorted({key for line in expected for key in line} - {"step"}):
        wanted = [(line["step"], line[name]) for line in expected if name in line]
        found = [(metric.step, metric.value) for metric in client.get_metric_history(record["run_id"], name)]
        if sorted(found) != wanted:
            return f"{run}: MLflow has {name} = {sorted(found)}, expected {wanted}"
    status = client.get_run(record["run_id"]).info.status
    return "" if status == "FINISHED" else f"{run}: is {status} in MLflow"


def table(counts: Counts, seconds: float, spread: float = 0.0) -> str:
    """What has been seen, for people."""
    lines = [f"{counts.kills} kills in {counts.runs} runs, {counts.resumes} resumes, {seconds:.0f} s"]
    lines += [f"  {count:>5}  {moment}" for moment, count in counts.moments.most_common()]
    lines += [f"  {count:>5}  killed: {who}" for who, count in counts.victims.most_common()]
    lost = counts.lost or [0]
    lines.append(f"steps lost and done again: {sum(lost)}, at most {max(lost)} at once (checkpoints every {INTERVAL})")
    equal = f"within {WITHIN * spread:.1e} (layouts differ by {spread:.1e})" if spread else "bit for bit"
    lines.append(
        f"{counts.runs} runs finished, each with the undisturbed run's {STEPS} losses {equal}; "
        f"{counts.tracked} of them in MLflow, every metric of every step once"
    )
    if counts.damaged:
        lines.append(f"newest checkpoints damaged, and the one before used: {counts.damaged}")
    return "\n".join(lines)


def campaign(
    folder: Path, kills: int, seed: int, say: Callable[[str], None], damage: bool, layouts: Sequence[Layout] = LAYOUTS
) -> Campaign:
    """Runs under fire until there have been `kills` kills; every fourth run is followed by MLflow, at one layout."""
    draw = random.Random(f"runs of {seed}")
    under_fire = Campaign(folder, seed, say, damage, layouts)
    one = len(layouts) == 1
    under_fire.run(EACH_MOMENT[:kills], tracked=one)
    while under_fire.counts.kills < kills:
        shots = min(kills - under_fire.counts.kills, draw.randint(2, MOST_SHOTS))
        under_fire.run([None] * shots, tracked=one and under_fire.counts.runs % 4 == 0)
    return under_fire


def main(arguments: list[str]) -> int:
    """Runs a campaign; returns 0, or 1 with what went wrong."""
    parser = argparse.ArgumentParser(description="Kills training runs and compares what they come to.")
    parser.add_argument("--kills", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--seed", type=int, default=1, help="of what is aimed at (default: 1)")
    parser.add_argument(
        "--damage", action=argparse.BooleanOptionalAction, default=True, help="damage checkpoints too (default: yes)"
    )
    parser.add_argument("--change-layout", action="store_true", help="every attempt has a layout of its own")
    parser.add_argument("--folder", type=Path, help="where runs go, kept on failure (default: a temporary folder)")
    parser.epilog = "example: python tests/durability/kill.py --kills 100 --seed 1"
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="sbn-kill-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        layouts = (*LAYOUTS, *OTHERS) if options.change_layout else LAYOUTS
        done = campaign(
            folder, options.kills, options.seed, lambda text: print(text, flush=True), options.damage, layouts
        )
    except FireError as error:
        print(f"{error}\nkept for a look: {folder}; --seed {options.seed}", file=sys.stderr)
        return 1
    print(table(done.counts, time.monotonic() - began, done.spread))
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
