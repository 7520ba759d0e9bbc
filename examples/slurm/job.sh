# shellcheck shell=bash
# What the job scripts of this folder share; they read it with `source`. README.md explains it.
#
# Settings, as environment variables of sbatch:
#   VENV          virtual environment on a file system that all nodes see (.venv)
#   CONTAINER     image for Pyxis (a .sqsh file or a name); unset: VENV is used. MOUNTS: what it sees (/scratch,/data)
#   MAX_CRASHES   failures in a row, none later than MIN_LIFE_S seconds after the start, that end the job (3; 1800)
#   HEALTH_CHECK  command that succeeds on a healthy node (nvidia-smi, where there is one)
#
# Exit codes of `vcr1 train`: 0 done, 2 settings or data are wrong, 85 saved after a signal; any other one is a crash.

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}" || exit 1
LOGS=logs/$SLURM_JOB_NAME-$SLURM_JOB_ID
mkdir -p "$LOGS" || exit 1
STOP=     # set once Slurm has asked the job to stop
STEP_PID= # of the srun that is waited for

export PYTHONSAFEPATH=1 # the folder kernels/ is no package named `kernels`
export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # decoding and data loading have processes of their own
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from sbatch by itself
# NCCL's watchdog: after a collective's time limit each rank writes what it was waiting for.
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=1
export TORCH_FR_DUMP_TEMP_FILE=$PWD/$LOGS/collectives-

# A rank that fails takes the others along: SIGTERM at once, SIGKILL after the cluster's KillWait (30 s by default).
# One that is done does not, whatever the cluster's WaitTime: the first may go on, while a judge reads captions.
STEP_OPTIONS=(--open-mode=append --kill-on-bad-exit=1 --wait=0 --cpu-bind="${CPU_BIND:-cores}")
if [ -n "${CONTAINER:-}" ]; then
    STEP_OPTIONS+=(--container-image="$CONTAINER" --container-mounts="$PWD${MOUNTS:+,$MOUNTS}")
    STEP_OPTIONS+=(--container-workdir="$PWD" --no-container-mount-home)
else
    # shellcheck disable=SC1091
    source "${VENV:-.venv}/bin/activate" || exit 1
fi

say() { echo "$(date '+%F %T') [job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1))] $*"; }

# Runs a step with a log for each rank: step NAME [SRUN_OPTIONS...] -- COMMAND...
step() {
    local name=$1 options=()
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    exec srun "${STEP_OPTIONS[@]}" --job-name="$name" --output="$LOGS/$name-%t.log" "${options[@]}" "$@"
}

# Runs a step to its end, shows its first rank's log here, and passes on the signal before the time limit. Returns the
# step's exit code.
watch_step() {
    local log=$LOGS/$1-0.log code shown
    touch "$log"
    step "$@" &
    STEP_PID=$!
    tail --pid=$STEP_PID --lines=0 --follow=name "$log" 2>/dev/null &
    shown=$!
    while :; do # wait returns early when a signal comes
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
    say "Slurm asks to stop: saving"
    [ -z "$STEP_PID" ] || kill -USR1 "$STEP_PID"
}
trap on_usr1 USR1

# A rank's command, run by bash: its own exit code goes on record, for srun tells the largest of all and of signals only.
# A rank that has saved after a signal (85) ends as one that is done, so that nobody is killed for it.
# shellcheck disable=SC2016
AS_RANK='trap : TERM USR1; codes=$1; shift; "$@"; code=$?; echo $code >>"$codes"; [ $code = 85 ] || exit $code'

# Whether any rank of this start has ended with a code.
ended_with() { grep -qx "$1" "$LOGS/exit-codes" 2>/dev/null; }

# `vcr1 train` until it is done, over as many starts as it takes: train [SRUN_OPTIONS...] -- CONFIG [OPTIONS...]
train() {
    local options=() code
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    say "vcr1 train $* on $SLURM_JOB_NODELIST; logs: $LOGS/train-RANK.log"
    SECONDS=0
    rm -f "$LOGS/exit-codes"
    watch_step train "${options[@]}" -- bash -c "$AS_RANK" rank "$LOGS/exit-codes" vcr1 train "$@"
    code=$?
    if ended_with 2; then
        say "settings or data are wrong, see above: not started again"
        exit 2
    elif ended_with 85; then
        requeue "saved"
    elif [ $code = 0 ]; then
        say "done"
        exit 0
    fi
    [ -z "$STOP" ] || requeue "stopped before it could save (code $code): it goes on from its newest checkpoint"
    after_crash
}

# Puts the job back into the queue, unless it was cancelled. Does not return.
requeue() { # WHY [BAD_NODES]
    local state
    state=$(job_field JobState)
    if [ "$state" != RUNNING ]; then
        say "$1; the job is $state, so it is not started again"
        exit 1
    fi
    say "$1; started again${2:+, without $2}"
    if [ -n "${2:-}" ]; then
        exclude "$2"
        scontrol requeuehold "$SLURM_JOB_ID"
    else
        scontrol requeue "$SLURM_JOB_ID"
    fi && sleep 300 # Slurm ends this script
    say "Slurm did not requeue the job; submit it again to go on"
    exit 1
}

after_crash() {
    local crashes=1 bad
    [ $SECONDS -ge "${MIN_LIFE_S:-1800}" ] || crashes=$(($(cat "$LOGS/crashes" 2>/dev/null || echo 0) + 1))
    echo $crashes >"$LOGS/crashes"
    say "crashed; exit codes of the ranks that ended by themselves: $(sort -nu "$LOGS/exit-codes" 2>/dev/null | xargs)"
    grep -l -E '^(Traceback|Timeout|Fatal)' "$LOGS"/train-*.log | head -n 3 | xargs -r tail -n 25
    if [ $crashes -ge "${MAX_CRASHES:-3}" ]; then
        say "$crashes crashes soon after their starts: given up"
        exit 1
    fi
    bad=$(unhealthy_nodes)
    requeue "crash $crashes" "$bad"
}

# Names of the nodes on which HEALTH_CHECK fails or does not end, with commas between.
unhealthy_nodes() {
    local check=${HEALTH_CHECK:-'! command -v nvidia-smi || nvidia-smi'} healthy
    healthy=$(timeout 120 srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=90 \
        bash -c "timeout 60 bash -c '$check' >/dev/null 2>&1 && echo \$SLURMD_NODENAME" 2>/dev/null)
    comm -23 <(scontrol show hostnames "$SLURM_JOB_NODELIST" | sort) <(sort <<<"$healthy") | paste -sd, -
}

# Has this job keep away from nodes once it is held in the queue. Slurm changes that of pending jobs only, and this script
# ends with the requeue: so a small job does it, and releases this one.
exclude() { # NODES
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
