#!/usr/bin/env bash
# One command of this project on the nodes of a Slurm allocation:
#
#     sbatch cluster/slurm.sh python -m training.train prompt_switch run.name=mine run.storage=s3://runs …
#
# Each node runs one Ray node, the first one also the head and the command. Two minutes before the time limit, or when
# the nodes are taken away, Slurm sends SIGUSR1: the nodes are drained, training saves, and the job goes back to the
# queue, where the same command goes on. Sizes below are for 4 nodes of 4 GPUs: change them here or on sbatch's line.
#SBATCH --job-name=text-video-retrieval
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=48
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@150
#SBATCH --requeue
#SBATCH --open-mode=append
# shellcheck disable=SC2329 # functions that traps call
set -euo pipefail

if [ "$#" -eq 0 ]; then
    echo "error: no command given: sbatch cluster/slurm.sh python -m training.train PRESET key=value …" >&2
    exit 2
fi

umask 077
state=${RAY_STATE_DIR:-$HOME/.ray-slurm}/$SLURM_JOB_ID # on a file system that all nodes see
mkdir -p "$state"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token
[ -s "$RAY_AUTH_TOKEN_PATH" ] || openssl rand -hex 32 >"$RAY_AUTH_TOKEN_PATH"
export RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
grace=${GRACE_S:-110} # of the 150 s that Slurm gives, those in which training may save
# Two jobs of one node must not meet: ports by the job's number, below Ray's own 10002-19999.
port=$((6400 + SLURM_JOB_ID % 3000))

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
export RAY_ADDRESS=$address:$port
gpus=${SLURM_GPUS_ON_NODE:-0}

ray_node() { # name of the node, its options
    local node=$1
    shift
    RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=$grace \
        srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap \
        ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$gpus" \
        --temp-dir="/tmp/ray-$SLURM_JOB_ID" --disable-usage-stats "$@" &
}

end() {
    # SIGTERM lets `ray start --block` drain its node; the time limit ends what is left.
    kill -TERM "${ray[@]}" 2>/dev/null || true
    wait "${ray[@]}" 2>/dev/null || true
}

ray=()
ray_node "$head" --head --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1
ray+=("$!")
trap end EXIT
for _ in $(seq 120); do
    if ray status --address="$RAY_ADDRESS" >/dev/null 2>&1; then break; fi
    sleep 5
done
for node in "${nodes[@]:1}"; do
    ray_node "$node" --address="$RAY_ADDRESS"
    ray+=("$!")
done

"$@" &
command=$!

requeue() {
    echo "the allocation ends: draining its nodes; the job goes back to the queue" >&2
    kill -TERM "${ray[@]:1}" 2>/dev/null || true # the head stays until training has saved
    for _ in $(seq "$grace"); do
        kill -0 "$command" 2>/dev/null || break
        sleep 1
    done
    scontrol requeue "$SLURM_JOB_ID"
    kill -KILL "$command" "${ray[@]}" 2>/dev/null || true # what had to be saved is
    exit 0
}
trap requeue USR1

code=0
wait "$command" || code=$?
exit "$code"
