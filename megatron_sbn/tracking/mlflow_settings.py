"""What mlflow reads from the environment when it is imported or called. Imports no mlflow."""

import os

# What mlflow reads when it is imported or called; whoever sets these outside keeps his values. Retries are
# mlflow_delivery.py's work, so that mlflow's own do not hold its thread for minutes.
_MLFLOW_SETTINGS = (
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("MLFLOW_LOGGING_LEVEL", "ERROR"),
    ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
    ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
    ("MLFLOW_HTTP_REQUEST_TIMEOUT", "10"),
    ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"),
    ("GIT_PYTHON_REFRESH", "quiet"),
)


def configure_mlflow() -> None:
    """Sets what mlflow reads at its first import: call it before DeepSpeed is imported, which imports mlflow too."""
    for name, value in _MLFLOW_SETTINGS:
        os.environ.setdefault(name, value)
