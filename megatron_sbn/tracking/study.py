"""The parent run of a study in MLflow: one row that its runs are folded under, and that says how the study stands.

    parent   tags: study, run_kind = study         status: see `standing`
    child    tag mlflow.parentRunId, which the UI nests by

Runs of a study start at the same time on different machines, and MLflow makes no run only once. So whoever finds no
parent makes one, and everybody takes the oldest (start time, then id), when it starts and again when it ends; a parent
that was made in vain has no children and is deleted by its maker.

MLflow's client comes from mlflow_delivery.py, which also turns its failures into one line.
"""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_sbn.config import load_recipe
from megatron_sbn.errors import InputError
from megatron_sbn.runs.finished_run import Run
from megatron_sbn.runs.folder import RECIPE
from megatron_sbn.runs.metrics_file import Line
from megatron_sbn.runs.system_metrics import PREFIX

PARENT_TAG, STUDY_TAG, KIND_TAG = "mlflow.parentRunId", "study", "run_kind"
PERPLEXITY, BEST = "validation_perplexity", "best_validation_perplexity"
REPORT_FOLDER = "report"  # of the parent's artifacts
_PAGE = 1000


class Study:
    """What is said to MLflow about a run's study. Every method may be repeated.

    Args:
        client: MLflow's. experiment_id: of the runs. name: of the study.
    """

    def __init__(self, client: Any, experiment_id: str, name: str) -> None:  # noqa: ANN401 - MlflowClient
        self._client = client
        self._experiment_id = experiment_id
        self._name = name
        self._made: str | None = None

    def adopt(self, run_id: str, started: int) -> None:
        """Makes a run a child of the study's parent, which is made with that start (ms since 1970) if there is none."""
        parents = self._parents()
        if not parents:
            tags = {STUDY_TAG: self._name, KIND_TAG: "study"}
            self._made = self._client.create_run(self._experiment_id, started, tags, self._name).info.run_id
            parents = self._parents()
        parent = parents[0].info.run_id
        self._client.set_tag(run_id, PARENT_TAG, parent)
        if self._made not in (None, parent) and not self._children(self._made):
            self._client.delete_run(self._made)
            self._made = None
        self._tell(parents[0])

    def _tell(self, parent: Any) -> None:  # noqa: ANN401 - mlflow.entities.Run
        """Gives the parent the status of its children."""
        children = self._children(parent.info.run_id)
        self._tell_best(parent, children)
        status = standing(child.info.status for child in children)
        if status == "RUNNING":
            if parent.info.status != status:
                self._client.update_run(parent.info.run_id, status=status)
        else:
            self._client.set_terminated(parent.info.run_id, status)

    def _tell_best(self, parent: Any, children: Iterable[Any]) -> None:  # noqa: ANN401 - mlflow.entities.Run
        """Gives the parent the lowest of its children's last validation perplexities, and that run's name."""
        last = [(child.data.metrics[PERPLEXITY], child) for child in children if PERPLEXITY in child.data.metrics]
        if not last:
            return
        best, run = min(last, key=lambda pair: pair[0])
        if parent.data.metrics.get(BEST) != best:
            self._client.log_metric(parent.info.run_id, BEST, best)
            self._client.set_tag(parent.info.run_id, "best_run", run.info.run_name)

    def _parents(self) -> list[Any]:
        return _parents(self._client, [self._experiment_id], self._name)

    def _children(self, parent: str | None) -> list[Any]:
        return _children(self._client, self._experiment_id, parent)


def _parents(client: Any, experiment_ids: list[str], name: str) -> list[Any]:  # noqa: ANN401 - MlflowClient
    """Parents of this name, the oldest first."""
    query = f"tags.{STUDY_TAG} = '{name}' and tags.{KIND_TAG} = 'study'"
    found = client.search_runs(experiment_ids, query, max_results=_PAGE)
    return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))


def _children(client: Any, experiment_id: str, parent: str | None) -> list[Any]:  # noqa: ANN401 - MlflowClient
    return list(client.search_runs([experiment_id], f"tags.`{PARENT_TAG}` = '{parent}'", max_results=_PAGE))


def delivered(client: Any, name: str) -> list[Run]:  # noqa: ANN401 - MlflowClient
    """The runs of a study as MLflow has them, by name, without those whose recipe has not arrived.

    Raises InputError where it has no such study, or none of its runs.
    """
    parents = _known_parents(client, name)
    runs = [run for parent in parents for run in _children(client, parent.info.experiment_id, parent.info.run_id)]
    known = [run for run in runs if any(file.path == RECIPE for file in client.list_artifacts(run.info.run_id))]
    if not known:
        raise InputError(f"MLflow has no run of study {name!r} with its {RECIPE}; wait, or `sbn sync` a run's folder")
    return [_delivered_run(client, run) for run in sorted(known, key=lambda run: str(run.info.run_name))]


def attach(client: Any, name: str, files: Iterable[Path]) -> list[str]:  # noqa: ANN401 - MlflowClient
    """Puts files under report/ of the study's parent run, in every experiment that has it; returns the runs' ids.

    Those of before with the same names are replaced. Raises InputError where MLflow has no such study.
    """
    eldest: dict[str, str] = {}
    for parent in _known_parents(client, name):
        eldest.setdefault(parent.info.experiment_id, parent.info.run_id)
    for run_id in eldest.values():
        for file in files:
            client.log_artifact(run_id, str(file), REPORT_FOLDER)
    return list(eldest.values())


def _known_parents(client: Any, name: str) -> list[Any]:  # noqa: ANN401 - MlflowClient
    """Those of all experiments, the oldest first; InputError where there is none."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    parents = _parents(client, experiments, name)
    if not parents:
        raise InputError(
            f"MLflow has no study {name!r}; a run's tag `study`, or `name` of the sweep file, is what to give"
        )
    return parents


def _delivered_run(client: Any, run: Any) -> Run:  # noqa: ANN401 - MlflowClient, mlflow.entities.Run
    by_step: dict[int, Line] = {}
    # The steps of system metrics count samples.
    for name in (name for name in run.data.metrics if not name.startswith(PREFIX)):
        for point in client.get_metric_history(run.info.run_id, name):
            by_step.setdefault(point.step, {"step": point.step})[name] = point.value
    with TemporaryDirectory() as folder:
        recipe = load_recipe(client.download_artifacts(run.info.run_id, RECIPE, folder))
    ranks = run.data.tags.get("ranks")
    lines = [by_step[step] for step in sorted(by_step)]
    return Run(Path(run.info.run_name), recipe, lines, int(ranks) if ranks else None)


def standing(statuses: Iterable[str]) -> str:
    """RUNNING while a run is; else FAILED or KILLED if one ended so; else FINISHED."""
    found = set(statuses)
    for status in ("RUNNING", "SCHEDULED", "FAILED", "KILLED"):
        if status in found:
            return "RUNNING" if status == "SCHEDULED" else status
    return "FINISHED"
