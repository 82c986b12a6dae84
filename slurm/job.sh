# What the batch scripts share: start the ranks of a run, pass signals on, start the job again. Sourced; SBN_CODE is the
# folder of the code. What is decided is decided in megatron_sbn/cluster/job.py.
# shellcheck shell=bash

# What the script was asked meanwhile, USR1 or TERM: remembered, and passed on to the ranks as soon as there are any.
sbn_asked="" sbn_srun=""
sbn_ask() {
    [ "$sbn_asked" = TERM ] || sbn_asked=$1
    [ -z "$sbn_srun" ] || kill -"$1" "$sbn_srun"
}
trap 'sbn_ask USR1' USR1
trap 'sbn_ask TERM' TERM

# What fails in the site's file would fail again: one line, and the job ends. Functions of other files (`module`) may
# use commands that fail.
sbn_site=${SBN_ENV:-$SBN_CODE/slurm/env.sh}
sbn_site_failed() { # STATUS LINE
    trap - ERR
    local line
    line=$(sed -n "${2}s/^ *//p" "$sbn_site" 2>/dev/null)
    echo "sbn: $sbn_site:$2: \`${line:-source}\` failed with status $1 on ${HOSTNAME:-this machine};" \
        "mend it, or set SBN_ENV" >&2
    exit 2
}
[ -r "$sbn_site" ] || sbn_site_failed 1 0
set -E
trap 'sbn_status=$?; [ "${BASH_SOURCE[0]}" != "$sbn_site" ] || sbn_site_failed "$sbn_status" "$LINENO"' ERR
# shellcheck source=slurm/env.sh
source "$sbn_site"
sbn_node_environment
trap - ERR
set +E
export SBN_NPROC_PER_NODE SBN_MAX_RESTARTS SBN_MAX_FAILURES MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED=1
# The code of this job, whatever is in the working folder or installed.
export PYTHONSAFEPATH=1 PYTHONPATH="$SBN_CODE:$SBN_CODE/kernels${PYTHONPATH:+:$PYTHONPATH}"
# Since Slurm 22.05 srun does not take the job's --cpus-per-task over by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
# A job that was submitted from within a step inherits that step's variables.
unset "${!SLURM_STEP_@}" SLURM_STEPID

# Options of every srun, the site's; a container that srun starts (Pyxis) has the Python that decides, too.
sbn_options=("${SBN_SRUN_OPTIONS[@]}") sbn_step=()
case " ${sbn_options[*]} " in
*" --container-"*) sbn_step=(srun --nodes=1 --ntasks=1 --quiet "${sbn_options[@]}") ;;
esac
# Without a Python of the site's: the one that submitted, outside containers, which have their own.
[ ${#SBN_CONTAINER[@]} = 0 ] && [ ${#sbn_step[@]} = 0 ] || SBN_SUBMITTED_BY=""
: "${SBN_PYTHON:=${SBN_SUBMITTED_BY:-python3}}"

sbn_job() {
    local command=("${sbn_step[@]}" "${SBN_CONTAINER[@]}" "$SBN_PYTHON") status=0
    "${command[@]}" -m megatron_sbn.cluster "$@" || status=$?
    if [ "$status" = 126 ] || [ "$status" = 127 ]; then
        echo "sbn: ${command[*]} cannot be started on ${HOSTNAME:-this machine};" \
            "set SBN_PYTHON in $sbn_site to a Python of the nodes" >&2
        status=2
    fi
    return "$status"
}

# sbn_run LOG TARGET ARGUMENT...: one run, begun or gone on with; returns 75 if the job is to start again.
# sbn_part: srun's options of a run on a part of the job's nodes.
sbn_run() {
    local log=$1 status=0
    shift
    sbn_job begin "$@" || { status=$?; [ "$status" = 10 ] && return 0; return "$status"; }
    if [ -n "$sbn_asked" ]; then
        status=$((128 + $(kill -l "$sbn_asked"))) # as srun would have ended
    else
        # In the background: a shell runs its traps only while it waits, not while a command of its own runs.
        srun --ntasks-per-node=1 --kill-on-bad-exit=1 --open-mode=append --output="$log" "${sbn_options[@]}" \
            "${sbn_part[@]}" "${SBN_CONTAINER[@]}" "$SBN_PYTHON" -m megatron_sbn.cluster node "$@" &
        sbn_srun=$!
        [ -z "$sbn_asked" ] || kill -"$sbn_asked" "$sbn_srun"
        # `wait` returns early when a trap has run.
        while :; do
            wait "$sbn_srun" && status=0 || status=$?
            kill -0 "$sbn_srun" 2>/dev/null || break
        done
        sbn_srun=""
    fi
    sbn_job end --srun-status "$status" --asked "$sbn_asked" "$@"
}

# sbn_end STATUS: the job's end, or for 75 this job again, in its turn; of an array, this task alone.
sbn_end() {
    [ "$1" = 75 ] || exit "$1"
    trap '' USR1
    trap - TERM
    local job=$SLURM_JOB_ID
    [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    scontrol requeue "$job" && sleep 60 # until Slurm ends this script
    exit "$1"
}

# sbn_main LOG TARGET ARGUMENT...: a whole job.
sbn_main() {
    sbn_run "$@"
    sbn_end $?
}
