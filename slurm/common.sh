# What the batch scripts share. Each sources this file once it has set $script, its name, and $project; nothing here
# knows a site. Defined below: fail, flag, meet, layout, examine, stage,
# unstage, back_to_queue.
# shellcheck shell=bash disable=SC2034,SC2154

fail() {
    echo "$script: $1" >&2
    exit 1
}

# The last value of a flag: `flag log_path "$@"`.
flag() {
    local name="__$1" value='' previous='' argument
    shift
    for argument in "$@"; do
        case ${argument//-/_} in
            "$name"=*) value="${argument#*=}" ;;
            *) [[ ${previous//-/_} == "$name" ]] && value="$argument" ;;
        esac
        previous="$argument"
    done
    echo "$value"
}

# A raw job id may stand for a whole array; this names our own task of it.
job="${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
job="${job:-$SLURM_JOB_ID}"
restart="${SLURM_RESTART_COUNT:-0}"

site="${NSI_SITE:-$project/slurm/site.sh}"
if [[ -f $site ]]; then
    set +u # what `module load` runs is not written for -u
    # shellcheck disable=SC1090
    source "$site" || fail "$site: cannot be read; see its error above"
    if declare -F nsi_site >/dev/null; then
        nsi_site || fail "$site: nsi_site failed; see its error above"
    fi
    set -u
elif [[ ${NSI_SITE:-} ]]; then
    fail "NSI_SITE=$NSI_SITE: no such file; copy slurm/site.example.sh there and edit it"
fi

python="${NSI_PYTHON:-$project/.venv/bin/python}"
if [[ ! ${NSI_CONTAINER:-} ]] && ! command -v "$python" >/dev/null; then
    [[ ! ${NSI_PYTHON:-} ]] || fail "NSI_PYTHON=$NSI_PYTHON: no such program; correct $site"
    python=python3 # a conda environment or a module that was active at sbatch
fi
# shellcheck disable=SC2206 # the container is several words
python=(${NSI_CONTAINER:-} "$python")

export PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [[ ${NSI_INTERFACE:-} ]]; then
    export NCCL_SOCKET_IFNAME="$NSI_INTERFACE" GLOO_SOCKET_IFNAME="$NSI_INTERFACE"
fi
mkdir -p logs || fail "$PWD/logs: cannot be made; submit from a folder that can be written"

# When Slurm will end the job, for the trainer; older versions do not say.
end="$(squeue --noheader --jobs="$job" --format=%e)"
[[ $end != 20* ]] || export SLURM_JOB_END_TIME="${SLURM_JOB_END_TIME:-$(date -d "$end" +%s)}"

state() {
    squeue --noheader --jobs="$job" --format=%T
}

# Whether this is still the job's newest start: on a node that was cut off a script lives on when Slurm has long begun
# another elsewhere, and once the node is back must not put that one back into the queue.
is_newest() {
    [[ $(scontrol show job "$job" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p') == "$restart" ]]
}

# Where ranks meet: on the first node, which is the one that runs this script. The port differs between jobs on a node
# and between a job's restarts (old sockets linger), and lies below the ephemeral range, where any other program may
# hold it. One that somebody listens on is passed over.
meet() {
    local tries
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + restart) % 10000))
    for ((tries = 0; tries < 100; tries++)); do
        (exec 3<>"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null || break
        MASTER_PORT=$((20000 + (MASTER_PORT - 19900) % 10000))
    done
    export MASTER_ADDR MASTER_PORT
    unset RANK WORLD_SIZE LOCAL_RANK # of a shell that was itself started by a launcher
}

# One task a GPU; without GPUs, the tasks that were asked for, or one a node. Sets per_node, cpus, and the options of
# srun for all ranks ($ranks) and for one process a node ($nodes).
layout() {
    ranks=()
    nodes=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
    if ((${SLURM_GPUS_ON_NODE:-0} > 0)); then
        per_node="$SLURM_GPUS_ON_NODE"
        local tasks=$((per_node * SLURM_JOB_NUM_NODES))
        ((${SLURM_GPUS:-$tasks} == tasks)) ||
            fail "--gpus=$SLURM_GPUS is not the same on each node; ask with --gpus-per-node"
        # The GPUs by name: a step of an --exclusive job, which owns them without having asked, would else see none.
        ranks=(--ntasks="$tasks" --ntasks-per-node="$per_node" --gres="gpu:$per_node")
        nodes+=(--gres="gpu:$per_node")
    elif [[ ${SLURM_NTASKS:-} ]]; then
        per_node="${SLURM_TASKS_PER_NODE%%[(,]*}" # srun knows the layout
    else
        per_node=1
        ranks=(--ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
    fi
    # srun does not take over sbatch's --cpus-per-task, and would leave each rank a single core.
    cpus="${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / per_node))}"
    if ((cpus == 0)); then # fewer cores than GPUs: ranks share
        cpus=1
        ranks+=(--overcommit)
    fi
    ranks+=(--cpus-per-task="$cpus")
    unset SLURM_CPUS_PER_GPU # counted in already; srun would weigh it against that
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cpus}" # where Slurm binds no cores, torch would take a whole node a rank
}

# Asks each node whether it is fit: `examine REPORT FLAGS`, flags of `nsi doctor`. Nodes that are not are left out, and
# the job goes back to the queue; what is wrong with the job itself ends it. NSI_DOCTOR=0 does without.
examine() {
    local report="$1" bad
    shift
    [[ ${NSI_DOCTOR:-1} != 0 ]] || return 0
    MASTER_PORT=$((MASTER_PORT + 1)) srun "${nodes[@]}" --export=ALL --kill-on-bad-exit=0 --wait=30 \
        "${python[@]}" -m launch doctor --report "$report" "$@" && return 0
    [[ -s $report/bad-nodes ]] || fail "the nodes were examined, and training would not work; see above"
    bad="$(paste -sd, "$report/bad-nodes")"
    back_to_queue "left out $bad" "$bad"
}

# Makes a folder of the job's own on each node's disk, $staged, which goes when the script ends.
stage() {
    local alive
    staged="$NSI_SCRATCH/nsi-$job"
    # What jobs left there that Slurm ended at once.
    if alive="$(squeue --noheader --user="$(id -un)" --format=%A)"; then
        # shellcheck disable=SC2016 # the nodes look into their own folders
        srun "${nodes[@]}" bash -c 'cd "$1" && for old in nsi-*; do
            [[ -O $old && " $2 " != *" ${old#nsi-} "* ]] && rm -rf "$old"; done; true' "$script" "$NSI_SCRATCH" "${alive//$'\n'/ }"
    fi
    trap unstage EXIT
    srun "${nodes[@]}" mkdir -p "$staged" || fail "$staged: cannot be made on all nodes; correct NSI_SCRATCH in $site"
}

unstage() {
    trap - EXIT
    [[ ! ${staged:-} ]] || srun "${nodes[@]}" rm -rf "$staged"
    staged=
}

# Ends this start of the job and queues it again: `back_to_queue REASON [NODES]`, without these nodes from now on. At
# most NSI_MAX_RESTARTS times.
back_to_queue() {
    local most="${NSI_MAX_RESTARTS:-20}" nodes_out="${2:-}" before tries
    # Any other state is Slurm's to end or requeue; a requeue here would bring a cancelled job back.
    is_newest && [[ $(state) == RUNNING ]] || exit 1
    ((restart < most)) || fail "$1, and it has come back $most times; set NSI_MAX_RESTARTS higher or submit again"
    echo "job $job: $1; back to the queue"
    unstage
    trap : TERM # Slurm ends this script now; the nodes can be left out only after that has begun
    scontrol requeue "$job" || fail "job $job cannot be requeued; submit it again"
    if [[ $nodes_out ]]; then
        before="$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')"
        [[ $before && $before != "(null)" ]] && nodes_out="$before,$nodes_out"
        for ((tries = 0; tries < 20; tries++)); do
            scontrol update JobId="$job" ExcNodeList="$nodes_out" && break
            sleep 0.2
        done
    fi
    exit 1
}
