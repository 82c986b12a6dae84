# The one file that a site edits. Sourced on the login node by `sbn submit`, and by every job.
# shellcheck shell=bash disable=SC2034

# Options of every job, as sbatch takes them. `sbn submit` gives SBN_NODES and SBN_NPROC_PER_NODE. It asks for GPUs
# (--gpus-per-node) and CPUs (--cpus-per-task) by itself, unless they are named here.
SBN_SBATCH_OPTIONS=(
    # --partition=gpu
    # --account=PROJECT
    # --gres=gpu:h100:"$SBN_NPROC_PER_NODE"
)

# What a node has; by default what sinfo says of the partition. GPUs: `sbn submit` starts a rank on each. CPUs of a
# rank: by default 8 with a GPU and 4 without, if the node has them.
# SBN_GPUS_PER_NODE=8
# SBN_GPU=h100               as `sbn plan --device` calls them: `sbn submit` then says how long a run may take
# SBN_CPUS_PER_RANK=16

# The Python of the nodes, with megatron_sbn's dependencies (`make setup`): by default the one that ran `sbn submit`;
# of a job by hand, and in a container, python3. And what its command is put behind (a container; srun and scontrol stay
# outside).
# SBN_PYTHON=/shared/megatron_sbn/.venv/bin/python
SBN_CONTAINER=(
    # apptainer exec --nv /shared/images/megatron_sbn.sif
)

# Options of every srun. A container of Pyxis is named here: the Python in it then decides for the job, too, and is
# python3 unless SBN_PYTHON says otherwise. It has to see the run folder, the data and the copy of the code.
SBN_SRUN_OPTIONS=(
    # --container-image=/shared/images/megatron_sbn.sqsh
    # --container-mounts=/shared:/shared
    # --mpi=none
)

# A job starts again at its time limit at most so often, and after so many failures in a row not at all.
: "${SBN_MAX_RESTARTS:=50}"
: "${SBN_MAX_FAILURES:=3}"

# On the nodes, before Python: modules, network. A command here that fails ends the job. `sbn doctor --machine` on a
# node names its interfaces and adapters; the head of each node's log does, too. What is set already stays.
sbn_node_environment() {
    # module load cuda
    # NCCL says in one line why a connection failed; its own default is silence, INFO is thousands of lines.
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    # A switch of a large fabric may take tens of seconds to find another way. NCCL's own default (20 or less, by
    # release) gives a transfer about 4 s between retries, 22 about 17 s; a rank that is gone is found otherwise.
    export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
    # Where nodes have several networks, the one that reaches all of them: NCCL's start and, on CPUs, Gloo go over it.
    # export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
    # Adapters for data, where some are for storage.
    # export NCCL_IB_HCA=mlx5_0,mlx5_1
}
