#!/usr/bin/env bash
# One node of the job of pretrain.sbatch, in a step of Slurm:
#
#     node.sh look PORT     print `look`, the node's number, name and GPUs, and on the first node PORT
#                           or the next one that no program listens at
#     node.sh launch ARGS   start the launcher, in Apptainer's container if APPTAINER_IMAGE is set
#
# The status of `launch` is the launcher's, but 201 for 1, 202 for 2, 203 for 3: srun has only one, the
# highest of its nodes, and a failure that is final must count, not that another node lost this one.
set -euo pipefail

# Slurm gives a step some of a node's GPUs, where the batch script sees all of them.
num_gpus() {
    local visible=${CUDA_VISIBLE_DEVICES-}
    if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
        echo "$SLURM_GPUS_ON_NODE"
    elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # NoDevFiles: none
        if [ "$visible" = NoDevFiles ]; then visible=''; fi
        tr , '\n' <<<"$visible" | grep -c . || true
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus | grep -c '^GPU' || true
    else
        echo 0
    fi
}

is_in_use() { # PORT: whether a program of this node listens at it, by the kernel's tables
    local hex
    printf -v hex '%04X' "$1"
    grep -qsE "^ *[0-9]+: [0-9A-F]+:$hex [0-9A-F]+:0000 0A" /proc/net/tcp /proc/net/tcp6
}

look() {
    local port=-
    if [ "$SLURM_NODEID" -eq 0 ]; then
        port=$1
        while is_in_use "$port"; do port=$((port + 1)); done
    fi
    echo "look $SLURM_NODEID ${SLURMD_NODENAME:-$(hostname)} $(num_gpus) $port"
}

# All but the image's own PATH is as outside; what the launcher needs also where the site clears it.
in_container() {
    local program=apptainer name variables=''
    command -v apptainer >/dev/null || program=singularity
    for name in MEGAPOLY_STOPPED_STATUS PYTHONNOUSERSITE PYTHONUNBUFFERED SLURM_JOB_ID \
        SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID; do
        if [ -n "${!name:-}" ]; then variables+=,$name=${!name}; fi
    done
    # Kernels are compiled into the home folder of the image, which is read-only otherwise.
    exec "$program" exec --nv --writable-tmpfs --env "${variables#,}" --pwd /opt/megapoly \
        --bind "$PWD:/opt/megapoly${MOUNTS:+,$MOUNTS}" "$APPTAINER_IMAGE" "$@"
}

run_launcher() {
    trap - TERM INT HUP
    trap '' USR1 # Slurm signals every process of a step, and this signal kills
    set -- megapoly-launch --node-rank "$SLURM_NODEID" "$@"
    if [ -n "${APPTAINER_IMAGE:-}" ]; then in_container "$@"; fi
    exec "$@"
}

launch() {
    local status=0 interrupted pid
    # For the launcher, which gets it as well. Bash 5.2 loses the status of a process that ends by the
    # signal that interrupts `wait`.
    trap '' TERM INT HUP
    trap 'interrupted=yes; kill -TERM "$pid"' USR1 # of a --signal without B:
    run_launcher "$@" &
    pid=$!
    while :; do # a signal ends `wait` early
        interrupted='' status=0
        wait "$pid" || status=$?
        [ -n "$interrupted" ] || break
    done
    # Stopped before it trained: there is nothing to save.
    if [ "$status" -eq 143 ]; then status=$MEGAPOLY_STOPPED_STATUS; fi
    case $status in
    0 | "$MEGAPOLY_STOPPED_STATUS") ;;
    *) echo "pretrain.sbatch: the launcher on ${SLURMD_NODENAME:-$(hostname)} ended with status $status" >&2 ;;
    esac
    case $status in 1 | 2 | 3) status=$((200 + status)) ;; esac
    exit "$status"
}

"$@"
