#!/usr/bin/env bash
# Start training in a container: on this machine, or as one of the nodes of a job.
# usage(), below, describes its options; docs/how-to/containers.md has examples.
# It also runs in the bash of macOS, 3.2, where an empty array counts as unset (hence no -u) and the
# pattern after =~ may have parentheses only if it is a variable.
set -eo pipefail
unset CDPATH # with it `cd` may change to another folder, and prints which

usage() {
    cat <<'EOF'
usage: docker/launch.sh [option ...] [--] SCRIPT [argument ...]

Runs megapoly-launch (torchrun) in a container, on SCRIPT (such as examples/pretrain_moe.sh) with its
arguments: the same --config and overrides as without a container.

option                    variable         meaning (default)
--nnodes N                NNODES           nodes of the job (1)
--node-rank R             NODE_RANK        rank of this node, 0 to N - 1; 0 writes the log (0)
--rdzv-endpoint HOST:PORT RDZV_ENDPOINT    node 0, as the others reach it; required when N > 1
--nproc-per-node P        NPROC_PER_NODE   processes on this node (one for each GPU; 2 without GPUs)
--gpus G                  GPUS             all, none, or numbers or UUIDs, also of MIG parts: 0,1 (all)
--image NAME              IMAGE            image (megapoly:gpu; megapoly:cpu without GPUs)
--runs DIR                RUNS             mounted as runs/ (runs, created if it does not exist)
--data DIR                DATA             mounted as data/, read-only (data, if it exists)
--mount SRC:DST[:ro]                       mount another folder; may be repeated
--env NAME[=VALUE]                         set another variable; may be repeated
--shm-size SIZE           SHM_SIZE         private shared memory, such as 64g (the host's: --ipc=host)
--infiniband DIR          INFINIBAND       devices of the fabric (/dev/infiniband, if it exists)
--name NAME                                name of the container, for `docker stop NAME` (docker's choice)
--dry-run                                  print the docker command and run nothing
--help

Everything but these folders comes from the image: megapoly, examples/, configurations. `--mount
.:/opt/megapoly` replaces them by this checkout. Exported variables of the second column apply where
their option is not given.

Exported variables that begin with NCCL_, TORCH_, UCX_ or NVTE_ are also set in the container, and so
are GLOO_SOCKET_IFNAME, OMP_NUM_THREADS, PYTORCH_CUDA_ALLOC_CONF, HF_TOKEN, HF_HUB_OFFLINE and
MEGAPOLY_STOPPED_STATUS. The container runs as the caller, so that results belong to the caller.

SIGTERM and Ctrl-C make the job save and end with status 0; every node must get the signal. The
status is that of megapoly-launch: 2 means that configuration, data or checkpoint cannot be used. 125
to 127 are docker's: no engine, no image, no command.
EOF
}

# Rule, values, remedy.
refuse() {
    printf 'docker/launch.sh: %s\n' "$1$from_variables" >&2
    exit "${2:-2}"
}

is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }

# Their names are common: one may have been exported for another program.
from_variables=''
for variable in NNODES NODE_RANK RDZV_ENDPOINT NPROC_PER_NODE GPUS IMAGE RUNS DATA SHM_SIZE INFINIBAND; do
    [ -z "${!variable}" ] || from_variables+="${from_variables:+, }$variable"
done
from_variables=${from_variables:+" (exported and read: $from_variables)"}

number='^(0|[1-9][0-9]*)$'
host_and_port='^([^:]+|\[[^]]+\]):([1-9][0-9]*)$' # an IPv6 address has brackets
gpu='([0-9]+(:[0-9]+)?|(GPU|MIG)-[0-9A-Za-z/-]+)'
several_gpus="^$gpu(,$gpu)*\$"
all_or_none='^(all|none)$'
mount_point='^([^:]+):(/[^:]*)(:ro)?$'
assignment='^[A-Za-z_][A-Za-z0-9_]*(=.*)?$'
passed_prefixes='NCCL_|TORCH_|UCX_|NVTE_'
passed_names='GLOO_SOCKET_IFNAME|OMP_NUM_THREADS|PYTORCH_CUDA_ALLOC_CONF|HF_TOKEN|HF_HUB_OFFLINE'
passed_names+='|MEGAPOLY_STOPPED_STATUS'
workdir=/opt/megapoly # WORKDIR of the images
nnodes=${NNODES:-1}
node_rank=${NODE_RANK:-0}
endpoint=${RDZV_ENDPOINT:-}
nproc=${NPROC_PER_NODE:-}
gpus=${GPUS:-all}
image=${IMAGE:-}
runs=${RUNS:-runs}
data=${DATA:-}
shm_size=${SHM_SIZE:-}
infiniband=${INFINIBAND:-}
name='' dry_run='' script=()
mounts=() variables=()

while [ $# -gt 0 ]; do
    case $1 in
    --help) usage && exit 0 ;;
    --dry-run) dry_run=yes && shift && continue ;;
    --) shift && script=("$@") && break ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; # --option=value
    -*) ;;
    *) script=("$@") && break ;;
    esac
    [ $# -gt 1 ] || set -- "$1" ''
    case $1 in
    --nnodes) nnodes=$2 ;;
    --node-rank) node_rank=$2 ;;
    --rdzv-endpoint) endpoint=$2 ;;
    --nproc-per-node) nproc=$2 ;;
    --gpus) gpus=$2 ;;
    --image) image=$2 ;;
    --runs) runs=$2 ;;
    --data) data=$2 ;;
    --mount) mounts+=("$2") ;;
    --env) variables+=("$2") ;;
    --shm-size) shm_size=$2 ;;
    --infiniband) infiniband=$2 ;;
    --name) name=$2 ;;
    *) refuse "\`$1\` is not an option; --help lists them. Arguments of the script come after its name" ;;
    esac
    [[ -n $2 && $2 != --* ]] || refuse "\`$1\` needs a value; --help says which"
    shift 2
done

[ ${#script[@]} -gt 0 ] || refuse "a script must be named, as examples/pretrain_moe.sh; --help shows the line"
is_count "$nnodes" || refuse "\`--nnodes\` ($nnodes) must be a number of nodes, 1 or more"
[[ $node_rank =~ $number ]] && [ "$node_rank" -lt "$nnodes" ] ||
    refuse "\`--node-rank\` ($node_rank) must be below \`--nnodes\` ($nnodes): the nodes are 0 to $((nnodes - 1))"
if [ "$nnodes" -gt 1 ]; then
    [[ $endpoint =~ $host_and_port && ${#BASH_REMATCH[2]} -le 5 && ${BASH_REMATCH[2]} -le 65535 ]] ||
        refuse "\`--rdzv-endpoint\` (${endpoint:-not set}) must be HOST:PORT of node 0 where \`--nnodes\` ($nnodes) \
is above 1; HOST is what the other nodes call it, [fd00::1] if by IPv6, PORT at most 65535, as 29500"
elif [ -n "$endpoint" ]; then
    refuse "\`--rdzv-endpoint\` ($endpoint) is for jobs of several nodes; set \`--nnodes\` (1), or leave it out"
fi

case $gpus in
all) default_nproc=gpu ;;
none) default_nproc=2 ;;
*)
    [[ $gpus =~ $several_gpus ]] ||
        refuse "\`--gpus\` ($gpus) must be all, none, or numbers or UUIDs of GPUs with commas between, as 0,1"
    commas=${gpus//[^,]/}
    default_nproc=$((${#commas} + 1))
    ;;
esac
nproc=${nproc:-$default_nproc}
is_count "$nproc" || [ "$nproc" = gpu ] ||
    refuse "\`--nproc-per-node\` ($nproc) must be a number of processes, 1 or more"
[[ $gpus =~ $all_or_none ]] || [ "$nproc" = gpu ] || [ "$nproc" -le "$default_nproc" ] ||
    refuse "\`--nproc-per-node\` ($nproc) must not exceed the GPUs of \`--gpus\` $gpus ($default_nproc): \
each process has its own"
if [ "$gpus" = none ]; then
    [ "$nproc" != gpu ] || refuse "\`--nproc-per-node\` (gpu) needs GPUs; set a number, or \`--gpus\` (none) to all"
    image=${image:-megapoly:cpu}
else
    image=${image:-megapoly:gpu}
fi

# Print the absolute path, which docker needs; $2 is the option that named it.
absolute() {
    [ -d "$1" ] || refuse "\`$2\` ($1) must be a folder on this machine; make it, or name another"
    (cd -- "$1" && pwd)
}

# docker splits SRC:DST at the colon.
without_colon() {
    [[ $1 != *:* ]] || refuse "\`$2\` ($1) must have no colon in its path, for docker; name a link to it"
}

[ -n "$dry_run" ] || command -v docker >/dev/null ||
    refuse "the command docker must be on the PATH; install it, or run the script itself without a container" 127

command=(docker run --rm --init)
[ -z "$name" ] || command+=(--name "$name")
command+=(--user "$(id -u):$(id -g)" --workdir "$workdir")
# Time to save a checkpoint before docker kills it; megapoly-launch gives its workers the same.
command+=(--stop-timeout 600)
# The image's health check would start a second program on the GPUs, whose memory the job may need.
command+=(--no-healthcheck)
case $gpus in
all) command+=(--gpus all) ;;
none) ;;
*) command+=(--gpus "\"device=$gpus\"") ;; # docker splits it at commas unless it is quoted
esac
if [ -n "$shm_size" ]; then command+=(--shm-size "$shm_size"); else command+=(--ipc host); fi
# Fabric and pinned memory need no limit on locked pages; NVIDIA's images recommend the stack.
command+=(--ulimit memlock=-1 --ulimit stack=67108864)
[ "$nnodes" -eq 1 ] || command+=(--network host)
if [ -n "$infiniband" ] || [ -d /dev/infiniband ]; then
    devices=$(absolute "${infiniband:-/dev/infiniband}" --infiniband)
    without_colon "$devices" --infiniband
    command+=(--device "$devices:/dev/infiniband" --cap-add IPC_LOCK)
fi

[ -n "$dry_run" ] || mkdir -p -- "$runs"
if [ -d "$runs" ]; then runs=$(absolute "$runs" --runs); elif [[ $runs != /* ]]; then runs=$PWD/$runs; fi
without_colon "$runs" --runs
command+=(--volume "$runs:$workdir/runs")
if [ -n "$data" ] || [ -d data ]; then
    data=$(absolute "${data:-data}" --data)
    without_colon "$data" --data
    command+=(--volume "$data:$workdir/data:ro")
fi
targets=("$workdir")
kept=("$workdir/runs") # folders that outlive the container
for mount in "${mounts[@]}"; do
    [[ $mount =~ $mount_point ]] ||
        refuse "\`--mount\` ($mount) must be SRC:DST, DST from the root, as /scratch/me:/scratch; \
:ro behind it forbids writing"
    targets+=("${BASH_REMATCH[2]%/}")
    [ -n "${BASH_REMATCH[3]}" ] || kept+=("${BASH_REMATCH[2]%/}")
    options=${BASH_REMATCH[2]}${BASH_REMATCH[3]}
    source_path=$(absolute "${BASH_REMATCH[1]}" --mount)
    without_colon "$source_path" --mount
    command+=(--volume "$source_path:$options")
done

# Check whether a path of the container is one of the folders that follow, or in one.
is_within() {
    local path=$1 folder
    for folder in "${@:2}"; do [[ $path/ != "$folder"/* ]] || return 0; done
    return 1
}

# An absolute path is a file of the container: of a mount, or of the image.
for ((i = 1; i < ${#script[@]}; i++)); do
    case ${script[i]} in
    --config | --run_dir) option=${script[i]} value=${script[i + 1]} ;;
    --config=* | --run_dir=*) option=${script[i]%%=*} value=${script[i]#*=} ;;
    *) continue ;;
    esac
    if [ "$option" = --run_dir ]; then
        path=$value
        [[ $path == /* ]] || path=$workdir/$path
        is_within "$path" "${kept[@]}" || refuse "\`--run_dir\` ($value) must be in a folder that outlives the \
container, runs (\`--runs DIR\`) or one of \`--mount DIR:DIR\`"
    elif [[ $value == /* ]]; then
        is_within "$value" "${targets[@]}" || refuse "\`--config\` ($value) must be in a folder of the container, \
${targets[*]}; add \`--mount ${value%/*}:${value%/*}\`"
    fi
done

# By name: values stay out of the process list and of --dry-run.
while read -r variable; do
    command+=(--env "$variable")
done < <(compgen -e | LC_ALL=C sort | grep -E "^(${passed_prefixes}|(${passed_names})\$)")
for variable in "${variables[@]}"; do
    [[ $variable =~ $assignment ]] || refuse "\`--env\` ($variable) must be NAME or NAME=VALUE"
    command+=(--env "$variable")
done

command+=("$image" megapoly-launch --nproc-per-node "$nproc")
if [ "$nnodes" -gt 1 ]; then
    # Static rendezvous: node 0 opens the port, and ranks are in the order of the nodes.
    command+=(--nnodes "$nnodes" --node-rank "$node_rank")
    host=${endpoint%:*} host=${host#[} host=${host%]}
    command+=(--master-addr "$host" --master-port "${endpoint##*:}")
else
    command+=(--standalone)
fi
command+=("${script[@]}")

if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
