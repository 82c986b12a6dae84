"""The batch script of a job: a form of slurm/, with the job's options, paths and settings written into it.

Imports no torch.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_sbn.cluster.site import read_site
from megatron_sbn.cluster.snapshot import Snapshot
from megatron_sbn.config import Recipe
from megatron_sbn.errors import InputError

SETTINGS_LINE = "SBN_CODE=${SBN_CODE:-$SLURM_SUBMIT_DIR}\n"  # of a batch script: replaced by what is known here
TEMPLATES = {"run": "train.sbatch", "array": "train.sbatch", "series": "scaling.sbatch"}


@dataclass(frozen=True)
class Job:
    """One sbatch: a run, an array of runs that need as many ranks, or a series of runs on the same nodes.

    Attributes:
        nodes, per_node: nodes, and ranks on each; of a series, those of its largest run.
        recipes: by task number, run_dir absolute.
        asked: sbatch's options for GPUs and CPUs.
        sweep: of a series, the file.
    """

    name: str
    nodes: int
    per_node: int
    recipes: dict[int, Recipe]
    form: Literal["run", "array", "series"]
    asked: tuple[str, ...] = ()
    sweep: Path | None = None

    @property
    def folders(self) -> list[Path]:
        """Of its runs."""
        return [Path(str(recipe.run_dir)) for recipe in self.recipes.values()]


@dataclass(frozen=True)
class Submission:
    """Jobs, and the folder whose submissions/ they go into.

    Attributes:
        site: the env.sh that goes with them.
        options: sbatch's, for all of them. sbatch: the user's, after all others. at_most: tasks of an array at a time.
        notes: lines about what was chosen.
    """

    folder: Path
    jobs: tuple[Job, ...]
    site: Path
    options: tuple[str, ...] = ()
    sbatch: tuple[str, ...] = ()
    at_most: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def runs(self) -> list[Path]:
        """Folders of all runs."""
        return [run for job in self.jobs for run in job.folders]

    @property
    def submissions(self) -> Path:
        """Where one folder a submission is."""
        return self.folder / "submissions"


def recipe_file(place: Path, recipe: Recipe) -> Path:
    """Where a submission has a resolved recipe."""
    return place / "recipes" / f"{recipe.name}.yaml"


def batch_script(submission: Submission, job: Job, place: Path, code: Snapshot, environment: Path) -> str:
    """The batch script of the job's form, with its options and paths; SBN_LOGS begins one of srun's file patterns."""
    folder = submission.folder
    site = read_site(environment, job.nodes, job.per_node)
    options = [*site.options, f"--job-name={job.name}", f"--chdir={Path.cwd()}"]
    options += [f"--nodes={job.nodes}", "--ntasks-per-node=1", *job.asked, *submission.options]
    settings = [f"SBN_CODE={shlex.quote(str(place / 'code'))}", f"SBN_ENV={shlex.quote(str(place / 'env.sh'))}"]
    settings += [f"SBN_SUBMITTED_BY={shlex.quote(sys.executable)}"]
    if job.form == "run":
        (recipe,) = job.recipes.values()
        options.append(f"--output={_literal(folder / 'logs')}/slurm-%j.out")
        logs, target = shlex.quote(_literal(folder)), shlex.quote(str(recipe_file(place, recipe)))
        settings += [f"SBN_LOGS={logs}/logs", f"set -- --nproc-per-node {job.per_node} {target}"]
    elif job.form == "array":
        limit = f"%{submission.at_most}" if submission.at_most else ""
        options += [f"--output={_literal(place)}/slurm-%A-%a.out", f"--array={ranges(list(job.recipes))}{limit}"]
        settings += ["names=(", *(f"    [{number}]={recipe.name}" for number, recipe in job.recipes.items()), ")"]
        settings += ['name="${names[$SLURM_ARRAY_TASK_ID]}"']
        logs, target = (
            f'{shlex.quote(_literal(folder))}/"$name"',
            f'{shlex.quote(str(place))}/recipes/"$name".yaml',
        )
        settings += [f"SBN_LOGS={logs}/logs", f"set -- --nproc-per-node {job.per_node} {target}"]
    else:
        options.append(f"--output={_literal(place)}/slurm-%j.out")
        runs, target = shlex.quote(str(folder.parent)), shlex.quote(str(place / "sweep.yaml"))
        settings += [f"SBN_LOGS={shlex.quote(_literal(place))}"]
        settings += [f"set -- --nproc-per-node {job.per_node} --folder {runs} {target}"]
    template = code.scripts / TEMPLATES[job.form]
    text = template.read_text(encoding="utf-8")
    if text.count(SETTINGS_LINE) != 1:
        raise InputError(f"{template}: has no line {SETTINGS_LINE.strip()!r}; take it from the project")
    lines = [f"#SBATCH {shlex.quote(option)}" for option in options]
    lines += [f"#SBATCH {shlex.join(submission.sbatch)}"] if submission.sbatch else []  # an option may be two words
    return text.replace(SETTINGS_LINE, "\n".join([*lines, *settings, ""]))


def _literal(folder: Path) -> str:
    """A path in Slurm's file patterns, where % is special."""
    return str(folder).replace("%", "%%")


def ranges(numbers: list[int]) -> str:
    """As sbatch --array takes them: [0, 1, 2, 5] -> 0-2,5."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
