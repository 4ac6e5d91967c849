#!/usr/bin/env bash
# Any recipe on several nodes of a SLURM cluster. Submit from the repository's root:
#
#   sbatch --nodes 8 launch/slurm.sh launch/accelerate/fsdp2.yaml recipes/llama_commonsense.py \
#       --config recipes/configs/llama_commonsense_llama_70b.yaml --batch-size 64
#
# First the accelerate configuration (ddp, fsdp2, zero2, zero3; hsdp with its two sizes set to the number of nodes and to
# that of GPUs of each), then the recipe, then the recipe's own flags. What stands before launch/slurm.sh is sbatch's
# (--nodes, --gpus-per-node, --time, --partition, --account) and replaces the options below. batch_size counts all
# processes: fewer sequences than GPUs leave GPUs idle.
#
# Before the first job:
#   - activate the Python environment (it is inherited), on a disk that every node sees, as is this repository;
#   - download model and data where the network is (`hf download NAME`), into an HF_HOME that every node sees;
#     on compute nodes without network, submit with HF_HUB_OFFLINE=1 in the environment.
#
# Three minutes before the time limit, and when the job is pre-empted, SLURM sends SIGUSR1 or SIGTERM: the run saves, and
# the job is queued again. Pass --resume auto, and it goes on where it was. RESTARTS=3 in the environment queues it again
# after failures, too (a process that was killed, a GPU that is gone), until it has been that often.
#
# One task per node starts one process per GPU. PROCESSES_PER_NODE overrides the number of GPUs, for nodes without any.
#SBATCH --job-name=adalora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@180

set -euo pipefail

fail() {
    echo "slurm.sh: $1" >&2
    exit 2
}

[[ $# -ge 2 ]] || fail "usage: sbatch [sbatch options] launch/slurm.sh ACCELERATE_CONFIG RECIPE [recipe flags]"
config=$1
shift
[[ -f $config ]] || fail "$config is not a file: give launch/accelerate/fsdp2.yaml, and submit from the root"
[[ -f $1 ]] || fail "$1 is not a file: give a recipe, recipes/llama_commonsense.py for instance"
[[ -n ${SLURM_JOB_ID:-} ]] || fail "not inside a SLURM job: submit this file with sbatch"
per_node=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
[[ $per_node =~ ^[1-9][0-9]*$ ]] || fail "no GPUs on this node: add --gpus-per-node N, or set PROCESSES_PER_NODE"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=${nodes[0]:?scontrol named no node}
[[ ${RESTARTS:=0} =~ ^[0-9]+$ ]] || fail "RESTARTS=$RESTARTS must be an integer >= 0"
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node
threads=$((${SLURM_CPUS_ON_NODE:-1} / per_node))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

echo "slurm.sh: $SLURM_JOB_NUM_NODES nodes x $per_node processes, main process at $address:$port"
# The rank of a machine is known on that machine only: each task fills it in. "standard" keeps DeepSpeed from logging in
# to the other nodes by itself, where srun is already.
# Launchers would die of SIGUSR1, so they ignore it; the run has its own handler, and says in this file that it saved,
# because launchers end with their own exit code. The folder is ours alone: others write in /tmp, too.
private=$(mktemp -d "${TMPDIR:-/tmp}/adalora-dist-XXXXXXXXXX") || fail "no folder for the status: set TMPDIR"
trap 'rm -rf "$private"' EXIT
export ADALORA_DIST_STATUS_FILE=$private/status.json
trap : TERM USR1 # outlive a signal to this script until the run has ended
code=0
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
    bash -c 'trap "" USR1; exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' task \
    --config_file "$config" \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$((SLURM_JOB_NUM_NODES * per_node))" \
    --main_process_ip "$address" --main_process_port "$port" --deepspeed_multinode_launcher standard \
    "$@" || code=$?
if [[ -f $ADALORA_DIST_STATUS_FILE ]]; then
    echo "slurm.sh: the run was stopped by a signal and has saved: queueing the job again"
    scontrol requeue "$SLURM_JOB_ID"
elif [[ $code != 0 && ${SLURM_RESTART_COUNT:-0} -lt $RESTARTS ]]; then
    echo "slurm.sh: the run has failed with code $code: queueing the job again, up to its restart $RESTARTS"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
