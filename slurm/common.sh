# What the batch scripts share. Each sources this file once it has set $script, its name, and $project; nothing here
# knows a site. Sets $job, $restart, $site and $python; defined below: fail, flag, record, meet, free_port, layout,
# examine, stage, unstage, back_to_queue.
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
[[ ! ${NSI_CONTAINER:-} || ${NSI_PYTHON:-} ]] || python=python3 # the container's own
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

# Slurm's record of the job in one line. A controller that restarts, is busy or is out of reach is asked again.
record() {
    local tries
    scontrol show job --oneliner "$job" && return 0 # by a trap, a bare return has the status before the signal
    echo "job $job: asking again for an hour" >&2
    for ((tries = 0; tries < 720; tries++)); do
        sleep 5
        scontrol show job --oneliner "$job" 2>/dev/null && return 0
    done
    return 1
}

# Where ranks meet: on the first node, which is the one that runs this script. The port differs between jobs on a node
# and between a job's restarts (old sockets linger), and lies below the ephemeral range, where any other program may
# hold it. One that somebody listens on is passed over.
meet() {
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    MASTER_PORT="$(free_port $((SLURM_JOB_ID * 7 + restart)))"
    export MASTER_ADDR MASTER_PORT
    unset RANK WORLD_SIZE LOCAL_RANK # of a shell that was itself started by a launcher
}

free_port() {
    local port=$((20000 + $1 % 10000)) tries
    for ((tries = 0; tries < 100; tries++)); do
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
        port=$((20000 + (port - 19900) % 10000))
    done
    echo "$port"
}

# One task a GPU; without GPUs, the tasks that were asked for, or one a node. Sets per_node, cpus, and the options of
# srun for all ranks ($ranks) and for one process a node ($nodes).
layout() {
    ranks=()
    nodes=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
    if ((${SLURM_GPUS_ON_NODE:-0} > 0)); then
        per_node="$SLURM_GPUS_ON_NODE"
        local tasks=$((per_node * SLURM_JOB_NUM_NODES))
        local asked="${SLURM_GPUS:-$tasks}"
        ((${asked##*:} == tasks)) ||
            fail "--gpus=$SLURM_GPUS is not the same on each node; ask with --gpus-per-node"
        # The GPUs by name: a step of an --exclusive job, which owns them without having asked, would else see none.
        ranks=(--ntasks="$tasks" --ntasks-per-node="$per_node" --gres="gpu:$per_node")
        nodes+=(--gres="gpu:$per_node")
    elif [[ ${SLURM_NTASKS:-} ]]; then
        per_node="${SLURM_TASKS_PER_NODE%%[(,]*}" # srun knows the layout
    else # of --nodes=2-4 --ntasks-per-node=4 some versions leave the product to the job
        per_node="${SLURM_NTASKS_PER_NODE:-1}"
        ranks=(--ntasks=$((per_node * SLURM_JOB_NUM_NODES)) --ntasks-per-node="$per_node")
    fi
    # srun does not take over sbatch's --cpus-per-task, and would leave each rank a single core.
    local least # cores of the smallest node: `72(x2),36` has 36
    least="$(tr ',' '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)"
    cpus=$((least / per_node))
    ((${SLURM_CPUS_PER_TASK:-$cpus} >= cpus)) || cpus="$SLURM_CPUS_PER_TASK"
    if ((cpus == 0)); then # fewer cores than GPUs: ranks share
        cpus=1
        ranks+=(--overcommit)
    fi
    ranks+=(--cpus-per-task="$cpus")
    # Counted in already; srun would weigh them against what is asked for above, and show each task its share alone.
    unset SLURM_CPUS_PER_GPU SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK SLURM_GPU_BIND SLURM_NTASKS_PER_GPU \
        SLURM_TRES_PER_TASK SRUN_CPUS_PER_TASK
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cpus}" # where Slurm binds no cores, torch would take a whole node a rank
}

# Asks each node whether it is fit: `examine REPORT FLAGS`, flags of `nsi doctor`. Nodes that are not are left out, and
# the job goes back to the queue; what is wrong with the job itself ends it. NSI_DOCTOR=0 does without.
examine() {
    local report="$1" bad
    shift
    [[ ${NSI_DOCTOR:-1} != 0 ]] || return 0
    mkdir -p "$report" || fail "$report: cannot be written; choose another --log_path"
    rm -f "$report/bad-nodes" "$report/hopeless" # job numbers come again when a site sets its Slurm up anew
    MASTER_PORT="$(free_port $((MASTER_PORT + 1)))" srun "${nodes[@]}" --export=ALL --kill-on-bad-exit=0 --wait=30 \
        "${python[@]}" -m launch doctor --seconds 240 --report "$report" "$@" && return 0
    if [[ -s $report/bad-nodes ]]; then
        bad="$(paste -sd, "$report/bad-nodes")"
        back_to_queue "left out $bad" "$bad"
    fi
    # Slurm may have ended the examination, or not begun it, for reasons of its own.
    [[ -f $report/hopeless ]] || back_to_queue "the nodes could not be examined"
    fail "the nodes were examined, and training would not work; see above"
}

# Makes a folder of the job's own on each node's disk, $staged, which goes when the script ends.
stage() {
    local alive
    staged="$NSI_SCRATCH/nsi-$SLURM_JOB_ID"
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
    # A node that does not answer must not use up the time that is left; the next `stage` there sweeps.
    [[ ! ${staged:-} ]] || timeout 20 srun "${nodes[@]}" rm -rf "$staged"
    staged=
}

# Ends this start of the job and queues it again: `back_to_queue REASON [NODES]`, without these nodes from now on. At
# most NSI_MAX_RESTARTS times.
back_to_queue() {
    local most="${NSI_MAX_RESTARTS:-20}" nodes_out="${2:-}" now ended_here before tries
    # Slurm ends this script once the job is requeued, and the nodes can be left out only after that has begun.
    trap '' TERM USR1
    now="$(record)" || fail "$1, but slurmctld does not answer; submit the job again"
    # On a node that was cut off a script lives on when Slurm has long given the job to others; once the node is back it
    # must not put theirs into the queue. Nor end by itself: slurmd would take the job for running until Slurm ends it
    # there, as it does with what it finds on a node that returns, and drain the node should the job come there again.
    ended_here="*JobState=COMPLETING*BatchHost=$SLURMD_NODENAME *"
    # shellcheck disable=SC2053 # a pattern
    if [[ "$now " != *" Restarts=$restart "* && "$now " != $ended_here ]]; then
        echo "job $job: $1; others have this job now, and Slurm ends what is left of it here"
        exec sleep 3600
    fi
    # Any other state is Slurm's to end or requeue.
    if [[ "$now " != *" Restarts=$restart "* || "$now " != *" JobState=RUNNING "* ]]; then
        echo "job $job: $1; Slurm has ended this start already"
        exit 1
    fi
    ((restart < most)) || fail "$1, and it has come back $most times; set NSI_MAX_RESTARTS higher or submit again"
    echo "job $job: $1; back to the queue"
    unstage
    for ((tries = 0; tries < 6; tries++)); do
        scontrol requeue "$job" && break
        sleep 5
    done
    ((tries < 6)) || fail "job $job cannot be requeued; submit it again"
    if [[ $nodes_out ]]; then
        before="$(sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p' <<<"$now")"
        [[ $before && $before != "(null)" ]] && nodes_out="$before,$nodes_out"
        for ((tries = 0; tries < 20; tries++)); do
            scontrol update JobId="$job" ExcNodeList="$nodes_out" && break
            sleep 0.2
        done
        echo "job $job: should it wait for nodes that there are not: scontrol update JobId=$job ExcNodeList="
    fi
    exit 1
}
