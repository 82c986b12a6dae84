"""Bad input of every kind through the real entry points: one line and a documented status each time, or it works.

    python tests/durability/fuzz.py --cases 10000 --seed 1          # also `make fuzz`
    python tests/durability/fuzz.py --seed 1 --only 4711            # one case again: its files are kept, all is shown

Case N is a function of the seed and N. What is wrong is what sandbox.py says. Each case runs in a fork of one process
that has imported everything; `--processes` of them run as processes of their own too.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bad_arguments import argument_case
from bad_checkpoints import checkpoint_case
from bad_data import corpus_case, shard_case, tokenizer_case
from bad_recipes import recipe_case, sweep_case
from bad_runs import delivery_case, run_case
from good_input import make_good_input
from sandbox import Case, Sandbox, limit_memory

# What makes a case, and how often.
KINDS: tuple[tuple[Callable[[random.Random, Path], Case], int], ...] = (
    (recipe_case, 38),
    (sweep_case, 10),
    (argument_case, 10),
    (run_case, 14),
    (delivery_case, 2),
    (shard_case, 6),
    (tokenizer_case, 5),
    (corpus_case, 6),
    (checkpoint_case, 9),
)


@dataclass
class Counts:
    """What has been seen: cases by kind, statuses, and what was wrong."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    alone: int = 0


class Fuzzer:
    """Cases of one seed, in one folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.sandbox = Sandbox(folder)
        self._seed = seed
        make_good_input(folder / "good")

    def case(self, number: int) -> Case:
        """Writes the files of a case and says what to do with them."""
        draw = random.Random(f"{self._seed}-{number}")
        make = draw.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])[0]
        return make(draw, self.sandbox.prepare())


def campaign(fuzzer: Fuzzer, cases: range, processes: int, say: Callable[[str], None], seed: int) -> Counts:
    """All cases; the first `processes` that may run alone do so as well."""
    counts = Counts()
    for number in cases:
        if number % 1000 == 0 and number > cases.start:
            say(f"{number - cases.start} cases")
        case = fuzzer.case(number)
        verdict = fuzzer.sandbox.run(case)
        counts.kinds[case.kind] += 1
        counts.statuses[verdict.status] += 1
        wrong = verdict.wrong
        if not wrong and case.alone and counts.alone < processes:
            fuzzer.case(number)
            counts.alone += 1
            wrong = fuzzer.sandbox.run_alone(case).wrong
            wrong = wrong and f"in a process of its own: {wrong}"
        if wrong:
            counts.wrong.append(wrong)
            say(f"case {number} ({case.kind}): {wrong}\n  again: fuzz.py --seed {seed} --only {number}")
    return counts


def show(fuzzer: Fuzzer, number: int) -> bool:
    """Runs one case and prints all about it; returns whether it is right."""
    case = fuzzer.case(number)
    print(f"{case}\nin {fuzzer.sandbox.case}")
    verdict = fuzzer.sandbox.run(case)
    print(f"{verdict.said}\nstatus {verdict.status}: {verdict.wrong or 'right'}")
    return not verdict.wrong


def import_everything() -> None:
    """What the commands import when they are called: once, before the forks."""
    from megatron_sbn.tracking.mlflow_settings import configure_mlflow

    configure_mlflow()  # before the engines import mlflow
    import megatron_sbn.analysis.report
    import megatron_sbn.cli
    import megatron_sbn.cluster.job
    import megatron_sbn.cluster.submission
    import megatron_sbn.data.corpus
    import megatron_sbn.doctor.command
    import megatron_sbn.plan.command
    import megatron_sbn.tracking.tracker
    import megatron_sbn.train
    import megatron_sbn.training.loop  # noqa: F401


def main(arguments: list[str]) -> int:
    """Runs a campaign; returns 0 where every case was right, else 1."""
    parser = argparse.ArgumentParser(description="Feeds bad input to every command.")
    parser.add_argument("--cases", type=int, default=10000, help="how many (default: 10000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (default: 0)")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--processes", type=int, default=50, help="so many as processes of their own too (default: 50)")
    parser.add_argument("--only", type=int, metavar="N", help="run case N alone and show it")
    parser.epilog = "example: python tests/durability/fuzz.py --cases 10000 --seed 1"
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="sbn-fuzz-"))
    import_everything()
    limit_memory()  # a case that is too large to make must not take the machine's memory
    fuzzer = Fuzzer(folder, options.seed)
    if options.only is not None:
        return 0 if show(fuzzer, options.only) else 1
    began = time.monotonic()
    numbers = range(options.first, options.first + options.cases)
    counts = campaign(fuzzer, numbers, options.processes, lambda text: print(text, flush=True), options.seed)
    print(
        f"{options.cases} cases in {time.monotonic() - began:.0f} s; {counts.alone} in processes of their own as well"
    )
    print("kinds: " + ", ".join(f"{count} {kind}" for kind, count in counts.kinds.most_common()))
    print("statuses: " + ", ".join(f"{status}: {count}" for status, count in counts.statuses.most_common()))
    print(f"wrong: {len(counts.wrong)}")
    shutil.rmtree(folder)
    return 1 if counts.wrong else 0


if __name__ == "__main__":
    # Nothing may be written beside the sources, and forks want a process without threads.
    sys.dont_write_bytecode = True
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    warnings.simplefilter("ignore")  # what the engines miss when they are imported
    sys.exit(main(sys.argv[1:]))
