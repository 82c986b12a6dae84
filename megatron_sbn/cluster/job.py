"""What the batch scripts in slurm/ ask: `python -m megatron_sbn.cluster ACTION TARGET [section.key=value ...]`.

    begin    on the batch host, before srun: 0 start the ranks, 10 there is nothing to do
    node     one task a node, under srun: starts this node's ranks and waits for them
    end      on the batch host, after srun: 75 start this job again, else the job's exit status
    sizes    of a sweep: a line NUMBER NODES for every recipe that the job's nodes can hold, the smallest first

TARGET is a recipe, or with --number K recipe K of a sweep. `node` answers 0 for a run that stopped in order, so that
srun --kill-on-bad-exit=1 ends the other nodes for a failure alone; how the run ended is in its folder (runs/status.py).
Imports no torch.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sbn.atomic_files import make_folder
from megatron_sbn.checkpoint.directory import saved_step
from megatron_sbn.cluster.attempts import Limits, decide, failures_in_a_row, read_attempts, record_attempt
from megatron_sbn.cluster.machine import describe
from megatron_sbn.cluster.slurm_queue import queued
from megatron_sbn.config import Recipe, load_recipe
from megatron_sbn.config.sweep import load_sweep
from megatron_sbn.config.validation import min_world_size, validate_world_size
from megatron_sbn.config.yaml_file import override_of
from megatron_sbn.engines import check_installed
from megatron_sbn.errors import STOPPED, InputError, RecipeError, SbnError
from megatron_sbn.launch import Machines, environment, launch
from megatron_sbn.launch.stop_signals import SIGNALS
from megatron_sbn.redaction import show_anything
from megatron_sbn.runs.folder import LOGS
from megatron_sbn.runs.status import read_status, slurm_attempt, switched_off, write_status

NOTHING_TO_DO = 10
# srun's status when a signal met it, or its tasks, before there were ranks that listen.
KILLED_BY_REQUEST = tuple(128 + number for number in SIGNALS)


class Task:
    """One run of a job: its recipe, folder, and the words that start its ranks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.ranks: int | None = None
        self.per_node: int | None = options.nproc_per_node
        if options.number is None:
            self.words = [options.target, *options.overrides]
            self.recipe: Recipe = load_recipe(options.target, options.overrides)
            folder = Path(self.recipe.run_dir or Path("runs") / f"{self.recipe.name}-{_job_name()}")
        else:
            sweep = load_sweep(options.target)
            if options.number not in range(len(sweep.variants)):
                raise RecipeError(f"--number {options.number}: {options.target} has {len(sweep.variants)} recipes")
            variant = sweep.variants[options.number]
            self.words, self.recipe = [str(sweep.base), *variant.overrides], variant.recipe
            self.ranks = variant.ranks
            folder = Path(options.folder) / sweep.name / variant.name
        self.folder = folder.absolute()
        self.words.append(override_of("run_dir", str(self.folder)))


def begin(task: Task) -> int:
    """Whether there is anything to do; a start that died without a word is entered as a failure of its job.

    Raises InputError where another job that is in the queue has the run.
    """
    status = read_status(task.folder)
    if status is not None and status.state == "RUNNING" and status.job:
        own, _ = slurm_attempt()
        if status.job != own and _in_queue(status.job):
            raise InputError(f"{task.folder}: job {status.job} has this run; wait for it, or scancel it first")
        reason = f"job {status.job} ended without a word"
        record_attempt(task.folder, replace(status, state="FAILED", reason=reason))
        write_status(task.folder, "FAILED", None, saved_step(task.folder), reason)
        failures = failures_in_a_row(read_attempts(task.folder), own)
        if failures >= _limits().failures:  # such starts are Slurm's own, which counts none of them
            print(f"{task.folder}: ends: {failures} failures in a row (SBN_MAX_FAILURES); the last: {reason}")
            return 1
    if status is not None and status.state == "FINISHED" and status.step >= task.recipe.training.steps:
        print(f"{task.folder}: finished already, {status.step} steps")
        return NOTHING_TO_DO
    if switched_off(task.folder):
        print(f"{task.folder}: there is a STOP file; remove it to go on")
        return NOTHING_TO_DO
    _check_engines()
    make_folder(task.folder / LOGS)
    write_status(task.folder, "RUNNING", None, saved_step(task.folder))
    return 0


def node(task: Task) -> int:
    """This node's ranks; a failure is recorded in the run folder by whoever sees it first."""
    nodes, own = environment.world_size(), environment.rank()
    # One node needs neither a name that resolves nor a port that another job's might meet.
    alone = nodes == 1
    machines = Machines() if alone else Machines(nodes, own, environment.master_address(), environment.master_port())
    job, restart = slurm_attempt()
    print(f"job {job} restart {restart} node {machines.number} ({socket.gethostname()})", flush=True)
    print("\n".join(describe(task.folder)), flush=True)
    ranks = _ranks_per_node(task, machines.count)
    validate_world_size(task.recipe, ranks * machines.count)
    status = launch(task.words, ranks, machines=machines)
    recorded = read_status(task.folder)
    if status not in (0, STOPPED) and (recorded is None or recorded.state == "RUNNING"):
        log = f"sbn-{job}-node-{machines.number}.log"
        reason = f"node {machines.number} ({socket.gethostname()}): status {status}; see {log}"
        write_status(task.folder, "FAILED", status, saved_step(task.folder), reason)
    return 0 if status == STOPPED else status


def end(task: Task, srun_status: int, asked: str) -> int:
    """Records the attempt and says what is next."""
    status = read_status(task.folder)
    if status is None or status.state == "RUNNING":
        saved = saved_step(task.folder)
        if asked and srun_status in (0, *KILLED_BY_REQUEST):  # 0: every node's ranks stopped before the first step
            write_status(task.folder, "STOPPED", STOPPED, saved, f"SIG{asked}")
        else:
            write_status(task.folder, "FAILED", srun_status or 1, saved, f"srun ended with status {srun_status}")
        status = read_status(task.folder)
    assert status is not None
    record_attempt(task.folder, status)
    failures = failures_in_a_row(read_attempts(task.folder), status.job)
    verdict = decide(status, failures, _limits(), ending=asked == "TERM", switched_off=switched_off(task.folder))
    print(f"{task.folder}: {'starts again' if verdict.again else 'ends'}: {verdict.reason}")
    return STOPPED if verdict.again else _final(verdict.exit_status)


def sizes(path: str, per_node: int | None) -> int:
    """What scaling.sbatch runs, one after another; what is too large for the job's nodes is named and left out."""
    variants = load_sweep(path).variants
    available = _setting("SLURM_JOB_NUM_NODES", 1)
    per_node = per_node or _ranks_of_node([variant.recipe for variant in variants])
    per_node = per_node or -(-max(variant.ranks for variant in variants) // available)
    for number, variant in sorted(enumerate(variants), key=lambda item: item[1].ranks):
        nodes = -(-variant.ranks // per_node)
        if nodes <= available:
            print(number, nodes)
        else:
            print(f"{variant.name}: left out, needs {nodes} nodes and there are {available}", file=sys.stderr)
    return 0


def _check_engines() -> None:
    try:
        check_installed()
    except RecipeError as error:
        raise RecipeError(f"{sys.executable} on {socket.gethostname()}: {error}, or set SBN_PYTHON") from None


def _final(status: int) -> int:
    """75 is the script's word for "again"; a run that stopped for good ends with 1, so that nothing waits on it."""
    return 1 if status == STOPPED else status


def _ranks_per_node(task: Task, nodes: int) -> int:
    per_node = task.per_node or _ranks_of_node([task.recipe])
    if task.ranks is None:
        return per_node or max(1, min_world_size(task.recipe) // nodes)
    if task.ranks % nodes:
        raise RecipeError(f"{task.recipe.name}: its {task.ranks} ranks cannot be spread evenly over {nodes} nodes")
    return task.ranks // nodes


def _ranks_of_node(recipes: Sequence[Recipe]) -> int:
    """By SBN_NPROC_PER_NODE, else one a GPU that Slurm gave; 0 where neither says, or the recipes are for CPUs."""
    gpus = 0 if all(recipe.device == "cpu" for recipe in recipes) else _setting("SLURM_GPUS_ON_NODE", 0)
    return _setting("SBN_NPROC_PER_NODE", 0) or gpus


def _job_name() -> str:
    """The same at every restart of a job, and another for every task of an array."""
    array, number = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}-{number}" if array and number else slurm_attempt()[0] or "job"


def _in_queue(job: str) -> bool:
    """Whether Slurm has it still; where Slurm does not answer, the lock of the run folder remains."""
    try:
        return bool(queued({job}))
    except InputError:
        return False


def _limits() -> Limits:
    return Limits(_setting("SBN_MAX_RESTARTS", 50), _setting("SBN_MAX_FAILURES", 3))


def _setting(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdigit():
        raise RecipeError(f"environment variable {name} = {text!r} is not a number; set it in slurm/env.sh")
    return int(text) if text else otherwise


def main(arguments: list[str]) -> int:
    """Runs an action; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m megatron_sbn.cluster", description="for slurm/*.sbatch")
    parser.add_argument("action", choices=("begin", "node", "end", "sizes"))
    parser.add_argument("--number", type=int, help="of a sweep's recipe")
    parser.add_argument("--folder", default="runs", help="where STUDY/NAME goes (default: runs)")
    parser.add_argument("--nproc-per-node", type=int, help="ranks of a node (default: SBN_NPROC_PER_NODE, its GPUs)")
    parser.add_argument("--srun-status", type=int, default=0)
    parser.add_argument("--asked", default="", help="signal that the batch shell got: USR1 or TERM")
    parser.add_argument("target", metavar="RECIPE|SWEEP")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    show_anything()
    options = parser.parse_args(arguments)
    try:
        if options.action == "sizes":
            return sizes(options.target, options.nproc_per_node)
        task = Task(options)
        if options.action == "begin":
            return begin(task)
        return node(task) if options.action == "node" else end(task, options.srun_status, options.asked)
    except SbnError as error:
        print(f"sbn: {error}", file=sys.stderr, flush=True)
        return error.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
