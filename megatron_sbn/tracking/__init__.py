"""MLflow: what it is given of a run, by whom, and how a server that is away stops nothing. Imports no torch."""
