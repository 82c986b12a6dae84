# The one file that a site edits. Sourced on the login node by `sbn submit`, and by every job.
# shellcheck shell=bash disable=SC2034

# Options of every job, as sbatch takes them. `sbn submit` gives SBN_NODES and SBN_NPROC_PER_NODE.
SBN_SBATCH_OPTIONS=(
    # --partition=gpu
    # --account=PROJECT
    # --gpus-per-node="$SBN_NPROC_PER_NODE"
    # --cpus-per-gpu=16
)

# The Python of the nodes, with megatron_sbn's dependencies (`make setup`): by default the one that ran `sbn submit`;
# of a job by hand, and in a container, python3. And what its command is put behind (a container; srun and scontrol stay
# outside).
# SBN_PYTHON=/shared/megatron_sbn/.venv/bin/python
SBN_CONTAINER=(
    # apptainer exec --nv /shared/images/megatron_sbn.sif
)

# A job starts again at its time limit at most so often, and after so many failures in a row not at all.
: "${SBN_MAX_RESTARTS:=50}"
: "${SBN_MAX_FAILURES:=3}"

# On the nodes, before Python: modules, network.
sbn_node_environment() {
    # module load cuda
    # export NCCL_SOCKET_IFNAME=ib0
    :
}
