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
--gpus G                  GPUS             all, none, or numbers or UUIDs, also of MIG parts: 0,1 (those
                                           of CUDA_VISIBLE_DEVICES; all where it is not set)
--image NAME              IMAGE            image (megapoly:gpu; megapoly:cpu without GPUs)
--engine E                ENGINE           docker, podman or nerdctl (the first of them on the PATH)
--runs DIR                RUNS             mounted as runs/ (runs, created if it does not exist; when
                                           N > 1 it must be given, on a disk that all nodes share)
--data DIR                DATA             mounted as data/, read-only (data, if it exists)
--mount SRC:DST[:ro]                       mount another folder; may be repeated
--env NAME[=VALUE]                         set another variable; may be repeated
--shm-size SIZE           SHM_SIZE         private shared memory, such as 64g (the host's: --ipc=host)
--infiniband DIR          INFINIBAND       devices of the fabric (/dev/infiniband, if it exists)
--name NAME                                name of the container, for `docker stop NAME` (the engine's)
--dry-run                                  print the engine's command and run nothing
--help

Everything but these folders comes from the image: megapoly, examples/, configurations. `--mount
.:/opt/megapoly` replaces them by this checkout. Exported variables of the second column apply where
their option is not given.

Exported variables that begin with FI_, MEGAPOLY_, NCCL_, NVTE_, OTEL_, TORCH_ or UCX_ are also set in
the container, and so are CUDA_DEVICE_MAX_CONNECTIONS, GLOO_SOCKET_IFNAME, HF_HUB_OFFLINE, HF_TOKEN,
OMP_NUM_THREADS, PYTORCH_ALLOC_CONF, PYTORCH_CUDA_ALLOC_CONF and those of a proxy (HTTPS_PROXY, HTTP_PROXY,
NO_PROXY, also in small letters). A path in one of them that the container does not have is left out,
with a line that says so. Of caches the folder is mounted where it is: CUDA_CACHE_PATH, HF_DATASETS_CACHE,
HF_HOME, HF_HUB_CACHE, TORCHINDUCTOR_CACHE_DIR, TORCH_EXTENSIONS_DIR, TORCH_HOME, TRITON_CACHE_DIR. Other
variables, such as keys of an object store, need --env. The container runs as the caller, so that
results belong to the caller.

SIGTERM and Ctrl-C make the job save and end with status 0; every node must get the signal. The
status is that of megapoly-launch: 2 means that configuration, data or checkpoint cannot be used. 125
to 127 are the engine's: it does not run, no image, no command.
EOF
}

workdir=/opt/megapoly # WORKDIR of the images
engines='docker podman nerdctl'
# Options of the program that name files to read; those of the second line in a list or mapping.
read_one='--config|--data.tokenizer|--training.eval_tasks_data|--checkpoint.load'
read_several='--data.blend|--data.validation'
# .. and to write, which must outlive the container.
written='--run_dir|--data.cache_dir'
written_several='--logging.export' # as prometheus:/DIR/NAME.prom, among URLs
passed_prefixes='FI_|MEGAPOLY_|NCCL_|NVTE_|OTEL_|TORCH_|UCX_'
passed_names='CUDA_DEVICE_MAX_CONNECTIONS|GLOO_SOCKET_IFNAME|HF_HUB_OFFLINE|HF_TOKEN|OMP_NUM_THREADS'
passed_names+='|PYTORCH_ALLOC_CONF|PYTORCH_CUDA_ALLOC_CONF|HTTPS_PROXY|HTTP_PROXY|NO_PROXY'
passed_names+='|https_proxy|http_proxy|no_proxy'
# What a launcher around this script may have set for its own processes.
never_passed='MEGAPOLY_STATUS_FILE|MEGAPOLY_SOAK.*'
caches='CUDA_CACHE_PATH HF_DATASETS_CACHE HF_HOME HF_HUB_CACHE TORCHINDUCTOR_CACHE_DIR
    TORCH_EXTENSIONS_DIR TORCH_HOME TRITON_CACHE_DIR'

number='^(0|[1-9][0-9]*)$'
count='^[1-9][0-9]*$'
host_and_port='^([^:]+|\[[^]]+\]):([1-9][0-9]*)$' # an IPv6 address has brackets
gpu='([0-9]+(:[0-9]+)?|(GPU|MIG)-[0-9A-Za-z/-]+)'
several_gpus="^$gpu(,$gpu)*\$"
mount_point='^([^:]+):(/[^:]*)(:ro)?$'
assignment='^[A-Za-z_][A-Za-z0-9_]*(=.*)?$'

main() {
    note_exported_variables
    read_options "$@"
    check_nodes
    choose_gpus
    choose_processes
    choose_engine
    begin_command
    add_gpus
    add_limits_and_devices
    add_folders
    add_caches
    check_paths_of_program
    add_variables
    add_program
    if [ -n "$dry_run" ]; then
        printf '%q ' "${command[@]}"
        echo
    else
        exec "${command[@]}"
    fi
}

# Rule, values, remedy.
refuse() {
    printf 'docker/launch.sh: %s\n' "$1$from_variables" >&2
    exit "${2:-2}"
}

note() { printf 'docker/launch.sh: %s\n' "$1" >&2; }

# Their names are common: one may have been exported for another program.
note_exported_variables() {
    local variable
    from_variables=''
    for variable in NNODES NODE_RANK RDZV_ENDPOINT NPROC_PER_NODE GPUS IMAGE ENGINE RUNS DATA SHM_SIZE INFINIBAND; do
        [ -z "${!variable}" ] || from_variables+="${from_variables:+, }$variable"
    done
    from_variables=${from_variables:+" (exported and read: $from_variables)"}
}

read_options() {
    nnodes=${NNODES:-1} node_rank=${NODE_RANK:-0} endpoint=${RDZV_ENDPOINT:-} nproc=${NPROC_PER_NODE:-}
    gpus=${GPUS:-} image=${IMAGE:-} engine=${ENGINE:-} runs=${RUNS:-} data=${DATA:-}
    shm_size=${SHM_SIZE:-} infiniband=${INFINIBAND:-}
    name='' dry_run='' script=() mounts=() variables=()
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
        read_option "$1" "$2"
        shift 2
    done
    [ ${#script[@]} -gt 0 ] ||
        refuse "a script must be named, as examples/pretrain_moe.sh; --help shows the line"
}

read_option() {
    case $1 in
    --nnodes) nnodes=$2 ;;
    --node-rank) node_rank=$2 ;;
    --rdzv-endpoint) endpoint=$2 ;;
    --nproc-per-node) nproc=$2 ;;
    --gpus) gpus=$2 ;;
    --image) image=$2 ;;
    --engine) engine=$2 ;;
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
}

check_nodes() {
    [[ $nnodes =~ $count ]] || refuse "\`--nnodes\` ($nnodes) must be a number of nodes, 1 or more"
    [[ $node_rank =~ $number ]] && [ "$node_rank" -lt "$nnodes" ] ||
        refuse "\`--node-rank\` ($node_rank) must be below \`--nnodes\` ($nnodes): the nodes are 0 to $((nnodes - 1))"
    if [ "$nnodes" -eq 1 ]; then
        [ -z "$endpoint" ] || refuse "\`--rdzv-endpoint\` ($endpoint) is for jobs of several nodes; \
set \`--nnodes\` (1), or leave it out"
        return
    fi
    [[ $endpoint =~ $host_and_port && ${#BASH_REMATCH[2]} -le 5 && ${BASH_REMATCH[2]} -le 65535 ]] ||
        refuse "\`--rdzv-endpoint\` (${endpoint:-not set}) must be HOST:PORT of node 0 where \`--nnodes\` ($nnodes) \
is above 1; HOST is what the other nodes call it, [fd00::1] if by IPv6, PORT at most 65535, as 29500"
    [ -n "$runs" ] || refuse "\`--runs\` (not set) must be a folder on a disk that all nodes share where \
\`--nnodes\` ($nnodes) is above 1: checkpoints are written by all of them; set \`--runs DIR\`"
}

# An engine numbers the GPUs of a container anew, so that CUDA_VISIBLE_DEVICES itself stays outside.
choose_gpus() {
    local source=--gpus
    if [ -z "$gpus" ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        source=CUDA_VISIBLE_DEVICES
        gpus=,$CUDA_VISIBLE_DEVICES
        gpus=${gpus%%,-1*} gpus=${gpus#,} # CUDA reads it up to the first -1
        [[ $gpus != NoDevFiles ]] || gpus='' # Slurm's word for none
        if [ -z "$gpus" ]; then
            gpus=none
            note "CUDA_VISIBLE_DEVICES ($CUDA_VISIBLE_DEVICES) hides all GPUs: none is used"
        fi
    fi
    gpus=${gpus:-all}
    case $gpus in
    all) num_gpus=gpu ;;
    none) num_gpus=0 ;;
    *)
        [[ $gpus =~ $several_gpus ]] || refuse "\`$source\` ($gpus) must be all, none, or numbers or UUIDs \
of GPUs with commas between, as 0,1"
        local commas=${gpus//[^,]/}
        num_gpus=$((${#commas} + 1))
        ;;
    esac
}

choose_processes() {
    if [ -z "$nproc" ]; then
        if [ "$gpus" = none ]; then nproc=2; else nproc=$num_gpus; fi
    fi
    [[ $nproc =~ $count || $nproc = gpu ]] ||
        refuse "\`--nproc-per-node\` ($nproc) must be a number of processes, 1 or more"
    if [ "$gpus" = none ]; then
        [ "$nproc" != gpu ] || refuse "\`--nproc-per-node\` (gpu) needs GPUs; set a number, or \`--gpus\` (none) to all"
        image=${image:-megapoly:cpu}
    else
        [[ $gpus = all || $nproc = gpu ]] || [ "$nproc" -le "$num_gpus" ] ||
            refuse "\`--nproc-per-node\` ($nproc) must not exceed the GPUs of \`--gpus\` $gpus ($num_gpus): \
each process has its own"
        image=${image:-megapoly:gpu}
    fi
}

choose_engine() {
    local each program
    for each in $engines; do
        if [ -z "$engine" ] && command -v "$each" >/dev/null; then engine=$each; fi
    done
    [[ " $engines " == *" ${engine:-docker} "* ]] || refuse "\`--engine\` ($engine) must be docker, podman or nerdctl"
    [ -n "$dry_run" ] || { [ -n "$engine" ] && command -v "$engine" >/dev/null; } ||
        refuse "${engine:-docker, podman or nerdctl} must be on the PATH; install it, or run the script itself without \
a container" 127
    program=${engine:-docker} engine=$program
    # Where docker is podman under another name, it would ignore --gpus without a word.
    if [ "$engine" = docker ] && command -v docker >/dev/null; then
        if [ "$(command -v docker)" -ef "$(command -v podman)" ] ||
            head -c 4096 "$(command -v docker)" | LC_ALL=C grep podman >/dev/null; then
            engine=podman
        fi
    fi
    command=("$program")
}

begin_command() {
    command+=(run --rm --init)
    [ -z "$name" ] || command+=(--name "$name")
    command+=(--user "$(id -u):$(id -g)" --workdir "$workdir")
    # Time to save a checkpoint before it is killed; megapoly-launch gives its workers the same.
    command+=(--stop-timeout 600)
    # The image's health check would start a second program on the GPUs, whose memory the job may need.
    # nerdctl has the option only in versions that have health checks.
    if [ "$engine" != nerdctl ] || nerdctl run --help 2>/dev/null | grep no-healthcheck >/dev/null; then
        command+=(--no-healthcheck)
    fi
    if [ "$engine" = podman ]; then
        # SELinux would hide the mounted folders and the GPUs.
        command+=(--security-opt label=disable)
        # Without root's rights the caller's id is another one inside unless it is kept.
        [ "$(id -u)" -eq 0 ] || command+=(--userns keep-id)
    fi
}

add_gpus() {
    local each
    case $engine/$gpus in
    */none) ;;
    podman/*) # by the container device interface, as `nvidia-ctk cdi list` names them
        for each in ${gpus//,/ }; do command+=(--device "nvidia.com/gpu=$each"); done
        ;;
    */all) command+=(--gpus all) ;;
    *) command+=(--gpus "\"device=$gpus\"") ;; # it is split at commas unless it is quoted
    esac
}

add_limits_and_devices() {
    if [ -n "$shm_size" ]; then command+=(--shm-size "$shm_size"); else command+=(--ipc host); fi
    # Fabric and pinned memory need no limit on locked pages; NVIDIA's images recommend the stack.
    # podman, which has no daemon, cannot raise a limit that the caller cannot, and would not start.
    if [ "$engine" = podman ] && ! (ulimit -l unlimited) 2>/dev/null; then
        command+=(--ulimit host)
    else
        command+=(--ulimit memlock=-1 --ulimit stack=67108864)
    fi
    [ "$nnodes" -eq 1 ] || command+=(--network host)
    if [ -n "$infiniband" ] || [ -d /dev/infiniband ]; then
        local devices
        devices=$(absolute "${infiniband:-/dev/infiniband}" --infiniband)
        without_colon "$devices" --infiniband
        command+=(--device "$devices:/dev/infiniband" --cap-add IPC_LOCK)
    fi
}

# Print the absolute path, which an engine needs; $2 is the option that named it.
absolute() {
    [ -d "$1" ] || refuse "\`$2\` ($1) must be a folder on this machine; make it, or name another"
    (cd -- "$1" && pwd)
}

# An engine splits SRC:DST at the colon.
without_colon() {
    [[ $1 != *:* ]] || refuse "\`$2\` ($1) must have no colon in its path, for $engine; name a link to it"
}

add_folders() {
    runs=${runs:-runs}
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
    local mount
    for mount in "${mounts[@]}"; do add_mount "$mount"; done
}

add_mount() {
    [[ $1 =~ $mount_point ]] || refuse "\`--mount\` ($1) must be SRC:DST, DST from the root, as \
/scratch/me:/scratch; :ro behind it forbids writing"
    local source=${BASH_REMATCH[1]} target=${BASH_REMATCH[2]} read_only=${BASH_REMATCH[3]} folder
    source=$(absolute "$source" --mount)
    without_colon "$source" --mount
    command+=(--volume "$source:$target$read_only")
    folder=$(resolved "$target")
    targets+=("$folder")
    [ -n "$read_only" ] || kept+=("$folder")
}

# Print a path of the container without `.` and `..`; from the program's folder if it is relative.
resolved() {
    local path=$1 part parts result=''
    [[ $path == /* ]] || path=$workdir/$path
    IFS=/ read -r -a parts <<<"$path"
    for part in "${parts[@]}"; do
        case $part in
        '' | .) ;;
        ..) result=${result%/*} ;;
        *) result+=/$part ;;
        esac
    done
    printf '%s\n' "${result:-/}"
}

# Check whether a path of the container is one of the folders that follow, or in one.
is_within() {
    local path folder
    path=$(resolved "$1")
    for folder in "${@:2}"; do [[ $path/ != "${folder%/}"/* ]] || return 0; done
    return 1
}

# A folder of compiled kernels or models, at the same place inside.
add_caches() {
    local variable folder
    passed_caches=()
    for variable in $caches; do
        folder=${!variable}
        [ -n "$folder" ] || continue
        [[ $folder == /* ]] || refuse "\`$variable\` ($folder) must be a path from the root, since the container \
has another folder of work; set it so, or unset it"
        if ! is_within "$folder" "${targets[@]}"; then
            [ -n "$dry_run" ] || mkdir -p -- "$folder"
            without_colon "$folder" "$variable"
            command+=(--volume "$folder:$folder")
            targets+=("$(resolved "$folder")")
        fi
        passed_caches+=("$variable")
    done
}

# The container must have what the program is to read, and keep what it writes.
check_paths_of_program() {
    local i option value next
    for ((i = 1; i < ${#script[@]}; i++)); do
        option=${script[i]%%=*}
        [[ "|$read_one|$read_several|$written|$written_several|" == *"|$option|"* ]] || continue
        next=${script[i + 1]}
        if [[ ${script[i]} == *=* ]]; then value=${script[i]#*=}; else value=$next; fi
        [[ -n $value && $value != --* ]] || refuse "\`$option\` needs a value, a path"
        if [[ "|$written|" == *"|$option|"* ]]; then
            check_written "$option" "$value"
        elif [[ "|$read_one|" == *"|$option|"* ]]; then
            check_read "$option" "$value"
        else
            check_each "$option" "$value"
        fi
    done
}

check_written() {
    [[ $2 != *://* && $2 != null ]] || return 0
    is_within "$2" "${kept[@]}" || refuse "\`$1\` ($2) must be in a folder that outlives the \
container, runs (\`--runs DIR\`) or one of \`--mount DIR:DIR\`"
}

check_read() {
    local folder=${2%/*}
    [[ $2 == */* && $2 != *://* ]] || return 0
    is_within "$2" "${targets[@]}" || refuse "\`$1\` ($2) must be in a folder of the container, \
${targets[*]}; add \`--mount ${folder:-/}:${folder:-/}\`"
}

# In a list or mapping, as [data/a, {path: /scratch/b, weight: 2}].
check_each() {
    local part parts separators=$'[]{},"\' \t\n'
    IFS=$separators read -r -d '' -a parts <<<"$2" || true
    for part in "${parts[@]}"; do
        case "|$written_several|/$part" in
        *"|$1|/prometheus:"*) check_written "$1" "${part#prometheus:}" ;;
        *"|$1|/"*) ;;
        *) check_read "$1" "$part" ;;
        esac
    done
}

# By name: values stay out of the process list and of --dry-run.
add_variables() {
    local variable value
    while read -r variable; do
        value=${!variable}
        if [[ " ${passed_caches[*]} " != *" $variable "* && $value == /* ]] &&
            ! is_within "$value" "${targets[@]}" /dev /tmp; then
            note "$variable ($value) is not set in the container, which has no such path; --mount its \
folder, or set another by --env"
            continue
        fi
        command+=(--env "$variable")
    done < <(names_of_passed_variables)
    for variable in "${variables[@]}"; do
        [[ $variable =~ $assignment ]] || refuse "\`--env\` ($variable) must be NAME or NAME=VALUE"
        command+=(--env "$variable")
    done
}

names_of_passed_variables() {
    {
        compgen -e | grep -E "^(${passed_prefixes}|(${passed_names})\$)" || true
        printf '%s\n' "${passed_caches[@]}"
    } |
        LC_ALL=C sort -u | grep -v -E "^($never_passed)?\$" || true
}

add_program() {
    command+=("$image" megapoly-launch --nproc-per-node "$nproc")
    if [ "$nnodes" -gt 1 ]; then
        # Static rendezvous: node 0 opens the port, and ranks are in the order of the nodes.
        command+=(--nnodes "$nnodes" --node-rank "$node_rank")
        local host=${endpoint%:*}
        host=${host#[} host=${host%]}
        command+=(--master-addr "$host" --master-port "${endpoint##*:}")
    else
        command+=(--standalone)
    fi
    command+=("${script[@]}")
}

main "$@"
