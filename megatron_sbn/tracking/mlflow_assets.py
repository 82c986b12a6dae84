"""What MLflow shows of a run beside numbers: its datasets, and a logged model for each checkpoint that was kept.

Nothing is copied: a dataset is a digest and a path, a model a path with its step and results. Every function may be
repeated. A server before MLflow 3 has no logged models; it is left without them.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sbn.runs.folder import CHECKPOINTS, METRICS
from megatron_sbn.runs.metrics_file import read_metrics
from megatron_sbn.runs.tracking_record import DatasetRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

DATASETS_PER_CALL = 100
MODEL_TYPE = "sparse-bitnet-checkpoint"
_RESULTS = ("validation_loss", "validation_perplexity", "loss")


def log_datasets(client: "MlflowClient", run: "MlflowRun", datasets: Sequence[DatasetRecord]) -> None:
    """Makes the datasets inputs of the run, those that are not yet."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    known = {(one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs} if run.inputs else set()
    inputs = [
        DatasetInput(
            Dataset(one.name, one.digest, "local", json.dumps({"uri": one.path})),
            [InputTag("mlflow.data.context", one.context)],
        )
        for one in datasets
        if (one.name, one.digest) not in known
    ]
    for start in range(0, len(inputs), DATASETS_PER_CALL):
        client.log_inputs(run.info.run_id, inputs[start : start + DATASETS_PER_CALL])


def log_models(client: "MlflowClient", experiment_id: str, run_id: str, folder: Path) -> None:
    """Makes a logged model of every checkpoint in the run folder, those that are none yet."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.exceptions import MlflowException

    kept = sorted(path for path in (folder / CHECKPOINTS).glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    if not kept:
        return
    try:
        known = {one.name for one in client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")}
    except MlflowException as error:
        if error.error_code in ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"):
            return
        raise
    results = {int(line["step"]): line for line in read_metrics(folder / METRICS)}
    outputs = []
    for path in kept:
        step = int(path.name.removeprefix("step-"))
        if path.name in known:
            continue
        at_step = {name: str(results[step][name]) for name in _RESULTS if name in results.get(step, {})}
        tags = {"path": str(path.absolute()), "step": str(step)} | at_step
        model = client.create_logged_model(experiment_id, path.name, run_id, tags, model_type=MODEL_TYPE)
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        outputs.append(LoggedModelOutput(model.model_id, step))
    if outputs:
        client.log_outputs(run_id, outputs)
