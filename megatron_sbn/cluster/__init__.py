"""Slurm: what a batch job decides (job), and the record of its attempts (attempts)."""
