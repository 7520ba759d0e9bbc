#!/usr/bin/env bash
# A real Slurm cluster with three nodes on this machine, for tests: munged, slurmctld and three slurmd on the loopback
# interface.
#   cluster.sh DIR start | stop | cut-power NODE | boot NODE
# All files (settings, keys, sockets, logs) are in DIR. Its path must be short, because paths of Unix sockets are limited to
# about 100 characters. Needs root and Debian's slurmctld, slurmd, slurm-client and munge. Clients need SLURM_CONF=DIR/slurm.conf.
# The nodes claim to have 128 CPUs and 8 GPUs each; no limits are enforced.
set -euo pipefail

dir=$(realpath -m "$1")
export SLURM_CONF=$dir/slurm.conf
nodes=(n1 n2 n3)
base_port=${BASE_PORT:-17817}

write_config() {
    local host gpu i
    host=$(uname -n)
    mkdir -p "$dir"/{state,spool,gpus,munge}
    chmod 755 "$dir" "$dir/munge"
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
    for gpu in {0..7}; do ln -sfn /dev/null "$dir/gpus/nvidia$gpu"; done
    {
        cat <<CONF
ClusterName=test
SlurmctldHost=${host%%.*}(127.0.0.1)
SlurmctldPort=$base_port
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_min_interval=200000
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=20
MinJobAge=3600
SlurmctldTimeout=600
SlurmdTimeout=600
BatchStartTimeout=600
MessageTimeout=100
OverTimeLimit=5
CONF
        for i in "${!nodes[@]}"; do
            echo "NodeName=${nodes[i]} NodeHostname=${host%%.*} NodeAddr=127.0.0.1 Port=$((base_port + 1 + i))" \
                "CPUs=128 RealMemory=1000000 Gres=gpu:h100:8"
        done
        echo "PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
    } >"$SLURM_CONF"
    printf 'AutoDetect=off\nName=gpu Type=h100 File=%s/gpus/nvidia[0-7]\n' "$dir" >"$dir/gres.conf"
    printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$dir/cgroup.conf"
}

# Prints the pid in a pid file, unless that pid now belongs to another program.
running() { # PIDFILE PROGRAM
    local pid
    pid=$(cat "$1" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$2" ] && echo "$pid"
}

wait_until() { # SECONDS COMMAND...
    local end=$((SECONDS + $1))
    until "${@:2}" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.2
    done
}

all_nodes_up() { [ "$(sinfo -h -N -o %t | grep -cE '^(idle|alloc|mix|comp)$')" = ${#nodes[@]} ]; }

boot() {
    mkdir -p "$dir/spool/$1"
    slurmd -N "$1"
}

start() {
    write_config
    munged --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" --num-threads=1
    slurmctld
    local node
    for node in "${nodes[@]}"; do boot "$node"; done
    wait_until 500 all_nodes_up || { tail -n 20 "$dir"/*.log >&2; return 1; }
}

descendants() {
    local child
    for child in $(cat /proc/"$1"/task/*/children 2>/dev/null); do
        echo "$child"
        descendants "$child"
    done
}

# Prints the pids of a node's step managers. All nodes share this machine; an open log file shows the node of a process.
step_managers() {
    local pid
    for pid in $(ps -eo pid=,comm= | awk '$2 == "slurmstepd" {print $1}'); do
        if ls -l "/proc/$pid/fd" 2>/dev/null | grep -qF "$dir/slurmd-$1.log"; then echo "$pid"; fi
    done
}

# Kills a node's daemon and everything that its jobs started, and deletes its state.
cut_power() {
    local pid pids
    pids=$(running "$dir/slurmd-$1.pid" slurmd || true)
    for pid in $(step_managers "$1"); do pids="$pids $pid $(descendants "$pid")"; done
    # shellcheck disable=SC2086
    kill -9 $pids 2>/dev/null || true
    rm -rf "$dir/slurmd-$1.pid" "$dir/spool/$1"
}

stop() {
    timeout 10 scancel --user=root 2>/dev/null || true
    wait_until 30 bash -c '[ -z "$(squeue -h)" ]' || true
    local node pid
    for node in "${nodes[@]}"; do cut_power "$node"; done
    for pid in $(running "$dir/slurmctld.pid" slurmctld) $(running "$dir/munge/pid" munged); do
        kill "$pid"
        wait_until 10 test ! -e "/proc/$pid" || kill -9 "$pid"
    done
}

case $2 in
    start) start ;;
    stop) stop ;;
    cut-power) cut_power "$3" ;;
    boot) boot "$3" && wait_until 500 all_nodes_up ;;
    *) echo "usage: $0 DIR start | stop | cut-power NODE | boot NODE" >&2; exit 2 ;;
esac
