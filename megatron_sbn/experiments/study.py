"""The parent run of a study in MLflow: one row that its runs are folded under, and that says how the study stands.

    parent   tags: study, run_kind = study         status: see `standing`
    child    tag mlflow.parentRunId, which the UI nests by

Runs of a study start at the same time on different machines, and MLflow makes no run only once. So whoever finds no
parent makes one, and everybody takes the oldest (start time, then id), when it starts and again when it ends; a parent
that was made in vain has no children and is deleted by its maker.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT_TAG, STUDY_TAG, KIND_TAG = "mlflow.parentRunId", "study", "run_kind"
_PAGE = 1000


class Study:
    """What is said to MLflow about a run's study. Every method may be repeated.

    Args:
        client: MLflow's. experiment_id: of the runs. name: of the study.
    """

    def __init__(self, client: "MlflowClient", experiment_id: str, name: str) -> None:
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

    def _tell(self, parent: "Run") -> None:
        """Gives the parent the status of its children."""
        status = standing(child.info.status for child in self._children(parent.info.run_id))
        if status == "RUNNING":
            if parent.info.status != status:
                self._client.update_run(parent.info.run_id, status=status)
        else:
            self._client.set_terminated(parent.info.run_id, status)

    def _parents(self) -> "list[Run]":
        """Parents of this name, the oldest first."""
        query = f"tags.{STUDY_TAG} = '{self._name}' and tags.{KIND_TAG} = 'study'"
        found = self._client.search_runs([self._experiment_id], query, max_results=_PAGE)
        return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    def _children(self, parent: str | None) -> "list[Run]":
        query = f"tags.`{PARENT_TAG}` = '{parent}'"
        return list(self._client.search_runs([self._experiment_id], query, max_results=_PAGE))


def standing(statuses: Iterable[str]) -> str:
    """RUNNING while a run is; else FAILED or KILLED if one ended so; else FINISHED."""
    found = set(statuses)
    for status in ("RUNNING", "SCHEDULED", "FAILED", "KILLED"):
        if status in found:
            return "RUNNING" if status == "SCHEDULED" else status
    return "FINISHED"
