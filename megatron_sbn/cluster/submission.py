"""`sbn submit` and `sbn sweep submit`: what a Slurm job needs, written where it will be found again, and sbatch.

    FOLDER/submissions/K/   code/ (snapshot.py)  env.sh  recipes/NAME.yaml (resolved)  NAME.sbatch  NAME.job (its id)

FOLDER is the run folder or, of a sweep, that of the study. A sweep is one array of jobs for each number of ranks; or
one job, in which all of them run one after another on the same nodes: a series, which goes by a copy of the sweep file.
A script holds all of its options and paths, so that `sbatch SCRIPT` by hand is the same job. Imports no torch.
"""

import os
import re
import shlex
import subprocess
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree, which

from megatron_sbn.atomic_files import exclusive, write_atomically
from megatron_sbn.cluster.batch_script import Job, Submission, batch_script, recipe_file
from megatron_sbn.cluster.resources import Place, asked_of_slurm, choose_ranks, on_gpus
from megatron_sbn.cluster.site import nodes_of, read_site, site_file
from megatron_sbn.cluster.slurm_queue import queued
from megatron_sbn.cluster.snapshot import Snapshot, find_code
from megatron_sbn.cluster.time_limit import time_note
from megatron_sbn.config import Recipe, check_no_password, load_recipe
from megatron_sbn.config.sweep import Variant, frozen, load_sweep
from megatron_sbn.data.data_check import missing_files, warn_of_data
from megatron_sbn.errors import InputError, RecipeError
from megatron_sbn.runs.folder import LOGS, RUNS, new_folder
from megatron_sbn.runs.status import read_status
from megatron_sbn.training.preflight import check_start

_DECIDED = re.compile(r"--(nodes|ntasks|ntasks-per-node|array|wrap)(=|$)|-[Nna]")
RANKS_PER_NODE = 8  # of a sweep, at most, where nothing else is known


@dataclass(frozen=True)
class Request:
    """What the command was told of a job.

    Attributes:
        per_node: ranks of a node, at most so many of a sweep; None: chosen here.
        limit: --time.
        sbatch: options that are sbatch's, passed on as they are.
    """

    per_node: int | None = None
    limit: str | None = None
    sbatch: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises RecipeError for an option that is decided here."""
        for word in self.sbatch:
            if _DECIDED.match(word):
                raise RecipeError(f"-- {word}: is not passed on to sbatch; give --nodes before the --")

    @property
    def options(self) -> tuple[str, ...]:
        """Of all its jobs."""
        return () if self.limit is None else (f"--time={self.limit}",)


def plan_run(recipe_path: str, overrides: list[str], nodes: int, request: Request, *, dry_run: bool) -> Submission:
    """One run; without a run_dir its folder is made here. Raises SbnError where it cannot start, or is finished."""
    recipe = load_recipe(recipe_path, overrides)
    place = _place(nodes, request)
    per_node, chosen = choose_ranks(recipe, nodes, request.per_node, place)
    check_start(recipe)
    own = RUNS / f"{recipe.name}-TIME" if dry_run else None
    folder = (Path(recipe.run_dir) if recipe.run_dir else own or new_folder(recipe.name)).absolute()
    status = read_status(folder)
    if status is not None and status.state == "FINISHED" and status.step >= recipe.training.steps:
        raise RecipeError(
            f"run_dir = {folder}: finished already, {status.step} steps; name another, or raise training.steps"
        )
    asked = asked_of_slurm([recipe], per_node, place)
    job = Job(recipe.name, nodes, per_node, {0: _placed(recipe, folder)}, "run", asked)
    notes = (f"ranks: {chosen}", time_note([job], request.limit, place))
    return Submission(folder, (job,), place.site.file, request.options, request.sbatch, notes=notes)


def plan_sweep(path: str, runs: str, request: Request, at_most: int | None, one_job: bool) -> Submission:
    """A study: an array for each number of ranks, or one job. Raises RecipeError."""
    sweep = load_sweep(path)
    folder = (Path(runs) / sweep.name).absolute()
    recipes = {number: _placed(v.recipe, folder / v.name) for number, v in enumerate(sweep.variants)}
    place = _place(1, request)
    gpus = any(on_gpus(recipe, place) for recipe in recipes.values())
    most = request.per_node or (place.gpus if gpus else 0) or RANKS_PER_NODE
    if one_job:
        nodes, each = _spread(path, max(sweep.variants, key=lambda variant: variant.ranks), most)
        for variant in sweep.variants:
            _spread(path, variant, most)
        asked = asked_of_slurm(list(recipes.values()), each, place)
        job = Job(sweep.name, nodes, each, recipes, "series", asked, Path(path))
        notes = (time_note([job], request.limit, place),)
        return Submission(folder, (job,), place.site.file, request.options, request.sbatch, notes=notes)
    jobs = []
    for ranks in sorted({variant.ranks for variant in sweep.variants}):
        own = {number: recipes[number] for number, v in enumerate(sweep.variants) if v.ranks == ranks}
        nodes, each = _spread(path, sweep.variants[min(own)], most)
        asked = asked_of_slurm(list(own.values()), each, place)
        jobs.append(Job(f"{sweep.name}-{ranks}-ranks", nodes, each, own, "array", asked))
    notes = (time_note(jobs, request.limit, place),)
    return Submission(folder, tuple(jobs), place.site.file, request.options, request.sbatch, at_most, notes)


def _place(nodes: int, request: Request) -> Place:
    site = read_site(site_file(), nodes, request.per_node)
    return Place(site, nodes_of([*site.options, *request.sbatch]), request.sbatch)


def _spread(path: str, variant: Variant, per_node: int) -> tuple[int, int]:
    """(nodes, ranks on each), at most `per_node` of them. Raises RecipeError where that is not even."""
    nodes = -(-variant.ranks // per_node)
    if variant.ranks % nodes:
        raise RecipeError(
            f"{path}: {variant.name} is for {variant.ranks} ranks, which cannot be spread evenly over "
            f"{nodes} nodes of at most {per_node}; give another --nproc-per-node"
        )
    return nodes, variant.ranks // nodes


def submit(submission: Submission, *, dry_run: bool) -> None:
    """Submits, or says what would be. Raises InputError; folders that it made are removed if nothing came of it."""
    if os.pathsep in str(submission.folder):
        raise InputError(
            f"{submission.folder}: a job finds its copy of the code by PYTHONPATH, which has no place for a path with "
            f"{os.pathsep!r}; name another folder"
        )
    code = find_code()
    environment = submission.site
    if dry_run:
        _refuse(submission)
        missing = _check_data(submission)
        place = submission.submissions / str(_next_number(submission))
        scripts = [batch_script(submission, job, place, code, environment) for job in submission.jobs]
        _explain(submission, place, code, environment, scripts)
        for line in missing:
            print(f"not there yet: {line}")
        return
    folders = [*submission.runs, submission.folder]
    made = [folder for folder in folders if not folder.exists() or not any(folder.iterdir())]
    try:
        for line in _check_data(submission):
            raise InputError(line)
        if which("sbatch") is None:
            raise InputError("sbatch is not on PATH: submit from a login node, or look first with --dry-run")
        with ExitStack() as locks:  # of the runs too: one of a study may be submitted by itself meanwhile
            for folder in sorted(set(folders)):
                locks.enter_context(exclusive(folder / "submission"))
            _refuse(submission)
            _make(submission, submission.submissions / str(_next_number(submission)), code, environment)
    except (InputError, OSError):
        _remove_empty(made)
        raise


def _check_data(submission: Submission) -> list[str]:
    """Files of data that are not there. Raises InputError for what does not belong together."""
    recipes = {
        (recipe.data, recipe.model.vocab_size): recipe for job in submission.jobs for recipe in job.recipes.values()
    }
    missing = list(dict.fromkeys(line for recipe in recipes.values() for line in missing_files(recipe)))
    if not missing:
        for recipe in recipes.values():
            warn_of_data(recipe)
    return missing


def _make(submission: Submission, place: Path, code: Snapshot, environment: Path) -> None:
    """Writes and starts the jobs; takes back what it wrote if none was submitted, and nothing that was there before."""
    own = [*(run / LOGS for run in submission.runs), submission.submissions]
    made = [folder for folder in own if not folder.exists()]
    taken: list[str] = []
    try:
        _write(submission, place, code, environment)
        _start(submission, place, taken)
    except (InputError, OSError):
        if not taken:
            rmtree(place, ignore_errors=True)
            _remove_empty(made)
        raise


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it holds something
            folder.rmdir()


def _placed(recipe: Recipe, folder: Path) -> Recipe:
    """With its run folder as an absolute path. Raises RecipeError where the file would hold a password."""
    check_no_password(recipe, "the run folder")
    return recipe.model_copy(update={"run_dir": str(folder)})


def _next_number(submission: Submission) -> int:
    numbers = [int(path.name) for path in submission.submissions.glob("*") if re.fullmatch(r"[0-9]{1,9}", path.name)]
    return max(numbers, default=0) + 1


def _refuse(submission: Submission) -> None:
    """Raises InputError where a job of before is still in the queue: two would write the same run."""
    runs = submission.runs
    folders = {submission.folder, *runs}
    jobs = {
        path.read_text(errors="replace").strip() for folder in folders for path in folder.glob("submissions/*/*.job")
    }
    jobs |= {status.job for status in map(read_status, folders) if status is not None}
    of_studies = {
        path.read_text(errors="replace").strip()
        for run in runs
        for recipe in run.parent.glob(f"submissions/*/recipes/{run.name}.yaml")
        for path in recipe.parents[1].glob("*.job")
    }
    waiting = queued(jobs | of_studies)
    if waiting:
        number = min(waiting & jobs or waiting)
        job = f"its job {number}" if number in jobs else f"job {number} of its study"
        raise InputError(f"{submission.folder}: {job} is still in the queue; wait for it, or scancel it first")


def _write(submission: Submission, place: Path, code: Snapshot, environment: Path) -> None:
    (place / "recipes").mkdir(parents=True)
    code.write(place / "code")
    (place / "env.sh").write_bytes(environment.read_bytes())
    for job in submission.jobs:
        (place / f"{job.name}.sbatch").write_text(
            batch_script(submission, job, place, code, environment), encoding="utf-8"
        )
        for recipe in job.recipes.values():
            recipe_file(place, recipe).write_text(recipe.to_yaml(), encoding="utf-8")
        for run in job.folders:
            (run / LOGS).mkdir(parents=True, exist_ok=True)
        if job.sweep is not None:
            for name, text in frozen(job.sweep).items():
                (place / name).write_text(text, encoding="utf-8")
            kept = [_placed(v.recipe, submission.folder / v.name) for v in load_sweep(place / "sweep.yaml").variants]
            assert kept == list(job.recipes.values()), f"{place / 'sweep.yaml'} is not {job.sweep}"


def _start(submission: Submission, place: Path, taken: list[str]) -> None:
    """Adds the jobs that sbatch took to `taken`. Raises InputError where it takes one no more."""
    print("".join(f"{note}\n" for note in submission.notes if note), end="")
    for job in submission.jobs:
        command = _command(place, job)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(
                f"sbatch refused {command[-1]}: {_one_line(done.stderr)}; "
                f"its options are those of env.sh (SBN_SBATCH_OPTIONS) and of this command"
            )
        number = done.stdout.strip().partition(";")[0]
        taken.append(number)
        try:
            write_atomically(place / f"{job.name}.job", f"{number}\n".encode())
        except InputError as error:
            raise InputError(f"{error}; job {number} is submitted all the same: let it run, or scancel it") from None
        print(f"submitted job {number}: {_size(job)}; {command[-1]}")
    print(f"runs in {submission.folder}; a file STOP there stops what is not finished")


def _command(place: Path, job: Job) -> list[str]:
    return ["sbatch", "--parsable", str(place / f"{job.name}.sbatch")]


def _size(job: Job) -> str:
    size = f"{job.nodes} node{'s' * (job.nodes > 1)} x {job.per_node} rank{'s' * (job.per_node > 1)}"
    forms = {
        "run": "",
        "array": f"{len(job.recipes)} runs, each ",
        "series": f"{len(job.recipes)} runs in turn, up to ",
    }
    return forms[job.form] + size


def _explain(submission: Submission, place: Path, code: Snapshot, environment: Path, scripts: list[str]) -> None:
    form = submission.jobs[0].form
    print(f"{'run' if form == 'run' else 'study'} folder  {submission.folder}")
    print(f"code        {len(code.files)} files, {code.size / 1e6:.1f} MB, commit {code.commit or 'unknown'}")
    print(f"            to {place / 'code'}")
    print(f"site        {environment}")
    logs = {"run": "logs/sbn-JOB", "array": "NAME/logs/sbn-JOB", "series": f"submissions/{place.name}/sbn-JOB-NUMBER"}
    print(f"node logs   {submission.folder}/{logs[form]}-node-N.log")
    print("".join(f"{note}\n" for note in submission.notes if note), end="")
    for job, script in zip(submission.jobs, scripts, strict=True):
        print(f"\n{_size(job)}\n$ {shlex.join(_command(place, job))}\n")
        print("\n".join(f"    {line}".rstrip() for line in script.splitlines()))
    print("\ndry run: nothing was written or submitted")


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip() or "no message"
