"""`sbn submit`: a run on Slurm."""

import argparse

from megatron_sbn.cli.options import Commands, add_command, add_job_options, add_overrides, positive


def submit(options: argparse.Namespace) -> int:
    """Hands a run to Slurm."""
    from megatron_sbn.cluster import submission

    request = submission.Request(options.nproc_per_node, options.time, tuple(options.sbatch))
    planned = submission.plan_run(options.recipe, options.overrides, options.nodes, request, dry_run=options.dry_run)
    submission.submit(planned, dry_run=options.dry_run)
    return 0


def add_submit(commands: Commands) -> None:
    """Its options."""
    command = add_command(commands, "submit", submit, "train a recipe on Slurm, from a copy of the code")
    command.add_argument("recipe", metavar="RECIPE", help="path of a recipe, such as recipes/quickstart.yaml")
    add_overrides(command)
    command.add_argument("--nodes", type=positive, default=1, metavar="N", help="nodes of the job (default: 1)")
    ranks = "ranks of a node (default: one a GPU, on CPUs one replica over the nodes)"
    command.add_argument("--nproc-per-node", type=positive, metavar="G", help=ranks)
    add_job_options(command)
    command.epilog = (
        "example: sbn submit recipes/quickstart.yaml --nodes 2 --nproc-per-node 2 --time 24:00:00 --dry-run\n"
        "         sbn submit recipes/quickstart.yaml training.steps=100 -- --partition=cpu --mem=8G"
    )
