# shellcheck shell=bash
# Functions that the job scripts of this directory share; they `source` this file. docs/cluster.md explains how to use
# them.
#
# Settings, as environment variables of sbatch:
#   VENV          virtual environment on a file system that all nodes share (default: .venv)
#   CONTAINER     image to use instead of VENV: a .sif file for Apptainer; anything else (.sqsh, a name) for Pyxis
#   MOUNTS        directories to mount into the container (for example /scratch,/data)
#   MAX_CRASHES   crashes in a row, without a new checkpoint between them, after which the job fails (default: 3)
#   HEALTH_CHECK  command that succeeds on a healthy node (default: nvidia-smi, if it is installed)
#
# Exit codes of `vcr1 train`: 0: done, 2: wrong settings or data, 85: saved after a signal. All others are crashes.

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}" || exit 1
LOGS=logs/$SLURM_JOB_NAME-$SLURM_JOB_ID
mkdir -p "$LOGS" || exit 1
STOP=     # set after Slurm has sent the signal to stop
STEP_PID= # the srun process that this script waits for

export PYTHONSAFEPATH=1 # otherwise the working directory's kernels/ would hide Hugging Face's package `kernels`
export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # decoding and data loading run in processes of their own
export SLURM_EXPORT_ENV=ALL # after `sbatch --export=NONE`, srun would give the ranks an environment without PATH
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit --cpus-per-task from sbatch
# NCCL's watchdog: if a collective times out, each rank writes which collective it was waiting for.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_DUMP_TEMP_FILE=$PWD/$LOGS/collectives-

# If a rank fails, Slurm stops the others: SIGTERM at once, SIGKILL after the cluster's KillWait (30 s by default).
# If a rank finishes, the others continue, whatever the cluster's WaitTime: the first rank may still wait for a judge.
STEP_OPTIONS=(--open-mode=append --kill-on-bad-exit=1 --wait=0 --cpu-bind="${CPU_BIND:-cores}")
WITHIN=() # command that runs the rest of its arguments in the container
if [[ "${CONTAINER:-}" = *.sif ]]; then
    WITHIN=(apptainer exec --nv --bind "$PWD${MOUNTS:+,$MOUNTS}" --pwd "$PWD" "$CONTAINER")
elif [ -n "${CONTAINER:-}" ]; then
    STEP_OPTIONS+=(--container-image="$CONTAINER" --container-mounts="$PWD${MOUNTS:+,$MOUNTS}")
    STEP_OPTIONS+=(--container-workdir="$PWD" --no-container-mount-home)
else
    # shellcheck disable=SC1091
    source "${VENV:-.venv}/bin/activate" || exit 1
fi

say() { echo "$(date '+%F %T') [job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1))] $*"; }

# step NAME [SRUN_OPTIONS...] -- COMMAND...
# Replaces this shell by a job step that writes one log per rank.
step() {
    local name=$1 options=()
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    exec srun "${STEP_OPTIONS[@]}" --job-name="$name" --output="$LOGS/$name-%t.log" "${options[@]}" -- "${WITHIN[@]}" "$@"
}

# watch_step NAME [SRUN_OPTIONS...] -- COMMAND...
# Runs a step until it ends, prints the log of its first rank, and forwards the signal that Slurm sends before the time
# limit. Returns the exit code of the step.
watch_step() {
    local log=$LOGS/$1-0.log code shown first
    touch "$log"
    first=$(($(wc -c <"$log") + 1)) # the log of earlier starts has been printed
    step "$@" &
    STEP_PID=$!
    tail --pid=$STEP_PID --bytes=+$first --follow=name "$log" 2>/dev/null &
    shown=$!
    while :; do # `wait` also returns when a signal arrives: repeat it until the step has ended
        wait "$STEP_PID"
        code=$?
        kill -0 "$STEP_PID" 2>/dev/null || break
    done
    wait "$STEP_PID" && code=0 || code=$?
    wait "$shown"
    return "$code"
}

on_usr1() {
    STOP=1
    say "Slurm asks the job to stop: saving"
    [ -z "$STEP_PID" ] || kill -USR1 "$STEP_PID"
}
trap on_usr1 USR1

# The command of each rank, run by bash. It records the rank's own exit code, because srun only reports the largest code
# of all ranks. A rank that saved after a signal (85) exits with 0, so that Slurm does not kill the ranks that still
# save; with 85 if the code could not be recorded, or the job would count as done. shellcheck disable=SC2016
AS_RANK='trap : TERM USR1; codes=$1; shift; "$@"; code=$?; echo $code >>"$codes" && [ $code = 85 ] || exit $code'

# Succeeds if any rank of this start has ended with the exit code.
ended_with() { grep -qx "$1" "$LOGS/exit-codes" 2>/dev/null; }

# train [SRUN_OPTIONS...] -- CONFIG [OPTIONS...]
# Runs `vcr1 train` once and, unless it is done, requeues the job. Does not return.
train() {
    local options=() code
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    say "vcr1 train $* on $SLURM_JOB_NODELIST; logs: $LOGS/train-RANK.log"
    rm -f "$LOGS/exit-codes"
    watch_step train "${options[@]}" -- bash -c "$AS_RANK" rank "$LOGS/exit-codes" vcr1 train "$@"
    code=$?
    if ended_with 2; then
        say "wrong settings or data, see above: not requeued"
        exit 2
    elif ended_with 85; then
        requeue "saved"
    elif [ $code = 0 ]; then
        say "done"
        exit 0
    fi
    [ -z "$STOP" ] || requeue "stopped before it could save (code $code): it continues from the latest checkpoint"
    after_crash
}

# requeue REASON [BAD_NODES]
# Puts the job back into the queue, unless it was cancelled. Does not return.
requeue() {
    local state
    state=$(job_field JobState)
    if [ "$state" != RUNNING ]; then
        say "$1; the job is $state, so it is not requeued"
        exit 1
    fi
    if [ -n "${2:-}" ] && exclude "$2"; then
        say "$1; requeued, without $2"
        scontrol requeuehold "$SLURM_JOB_ID"
    else
        say "$1; requeued${2:+, but $2 could not be excluded}"
        scontrol requeue "$SLURM_JOB_ID"
    fi && sleep 300 # Slurm ends this script
    say "Slurm did not requeue the job; submit it again to continue"
    exit 1
}

# Requeues the job after a crash, without the nodes that fail the health check; fails after too many crashes in a row.
# The count starts again at 1 if this start resumed from another checkpoint than the start that crashed before it.
# Otherwise a job that always crashes in the same step would use its nodes for ever, however late that step is.
after_crash() {
    local crashes=1 resumed bad
    resumed=$(grep -a -o 'resumed from .*' "$LOGS/train-0.log" 2>/dev/null | tail -n 1)
    [ "$resumed" != "$(sed -n 2p "$LOGS/crashes" 2>/dev/null)" ] || crashes=$(($(sed -n 1p "$LOGS/crashes" 2>/dev/null) + 1))
    if ! printf '%s\n' $crashes "$resumed" >"$LOGS/crashes"; then # without a count, it would be requeued for ever
        say "crashed, and $LOGS/crashes cannot be written: giving up"
        exit 1
    fi
    say "crashed; exit codes of the ranks that were not killed: $(sort -nu "$LOGS/exit-codes" 2>/dev/null | xargs)"
    grep -l -E '^(Traceback|Timeout|Fatal)' "$LOGS"/train-*.log | head -n 3 | xargs -r tail -n 25
    if [ $crashes -ge "${MAX_CRASHES:-3}" ]; then
        say "$crashes crashes without a new checkpoint: giving up"
        exit 1
    fi
    bad=$(unhealthy_nodes)
    requeue "crash $crashes" "$bad"
}

# Prints the names of the nodes on which HEALTH_CHECK fails or hangs, separated by commas. Prints nothing if it fails on
# all nodes of several: then the check itself does not work here.
unhealthy_nodes() {
    local group list hosts nodes= healthy=
    export HEALTH_CHECK=${HEALTH_CHECK:-'! command -v nvidia-smi || nvidia-smi'}
    for ((group = 0; group < ${SLURM_HET_SIZE:-1}; group++)); do
        list=SLURM_JOB_NODELIST${SLURM_HET_SIZE:+_HET_GROUP_$group}
        hosts=$(scontrol show hostnames "${!list}")
        nodes+=$hosts$'\n'
        healthy+=$(healthy_nodes ${SLURM_HET_SIZE:+--het-group=$group} --ntasks="$(wc -l <<<"$hosts")")$'\n'
    done
    if [ -z "${healthy//$'\n'/}" ] && [ "$(wc -w <<<"$nodes")" -gt 1 ]; then
        say "the health check fails on all nodes: no node is excluded" >&2
    else
        comm -23 <(sort <<<"$nodes") <(sort <<<"$healthy") | paste -sd, -
    fi
}

# healthy_nodes SRUN_OPTIONS...
# Prints the names of the nodes on which HEALTH_CHECK succeeds. --overlap: a hung training step may still hold the CPUs.
healthy_nodes() {
    timeout 120 srun "$@" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=90 --overlap \
        bash -c 'timeout 60 bash -c "$HEALTH_CHECK" >/dev/null 2>&1 && echo $SLURMD_NODENAME' 2>/dev/null
}

# exclude NODES
# Excludes nodes from the next start of this job. Slurm can change that only while a job is pending, but this script
# ends when its job is requeued. So it submits a small job that changes the requeued job, which is held, and releases
# it. Fails if Slurm refuses the small job: nothing would release the other one.
exclude() {
    local known
    known=$(job_field ExcNodeList)
    [ "$known" = "(null)" ] && known= || known=,$known
    sbatch --job-name="exclude-$1" --nodes=1 --ntasks=1 --time=30 --exclude="$1" --output="$LOGS/exclude.log" \
        ${SLURM_JOB_PARTITION:+--partition="$SLURM_JOB_PARTITION"} \
        ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} \
        --wrap="until scontrol update JobId=$SLURM_JOB_ID ExcNodeList=$1$known; do sleep 1; done
            scontrol release $SLURM_JOB_ID"
}

job_field() { scontrol --oneliner show job "$SLURM_JOB_ID" | grep -oP "\b$1=\K\S+" | head -n 1; }
