"""Slurm: what a batch job decides (job), the record of its attempts (attempts), and submitting it (submit, snapshot)."""
