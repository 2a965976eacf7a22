# What the scripts share whose work can be cut into parts, and stopped anywhere: shard.sbatch and features.sbatch source
# this file after common.sh. Sets $part, the words that tell a verb its part, and $cpus. Defined below: go_on.
# shellcheck shell=bash disable=SC2034,SC2153,SC2154

((SLURM_JOB_NUM_NODES == 1)) || fail "a part runs on one node; give --array=1-N for N parts in place of --nodes"

part=()
if [[ ${SLURM_ARRAY_TASK_ID:-} ]]; then
    ((SLURM_ARRAY_TASK_MIN == 1 && SLURM_ARRAY_TASK_MAX == SLURM_ARRAY_TASK_COUNT)) ||
        fail "the array must be 1-N; give the same line again where parts failed: what is there is not done twice"
    part=(--part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT")
    [[ ! $(flag part "$@") ]] || fail "--part and --array say the same; leave --part out"
fi
cpus="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$cpus}" # where Slurm binds no cores, torch would take a whole node

# Runs a command that goes on where it was cut. When the job's time is nearly up, the job goes back to the queue.
go_on() {
    local left=$((${SLURM_JOB_END_TIME:-9999999999} - $(date +%s)))
    ((left > 90)) ||
        fail "$left s are left until the job's end, and at 60 it goes back to the queue; ask for more with --time"
    trap 'back_to_queue "its time is up, and there is more to do"' USR1
    # In the background: a shell hears no signal while it waits for a command in the foreground.
    "$@" &
    wait $!
}
