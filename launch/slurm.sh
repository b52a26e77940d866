#!/usr/bin/env bash
#SBATCH --job-name=sdiff
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --output=sdiff-%j.log
#SBATCH --open-mode=append
#
# On a Slurm cluster, from the root of a checkout on a file system that all nodes share:
#   sbatch --nodes=4 launch/slurm.sh --config=configs/digits_diffusion.py
# Options of sbatch before the script override those above. One process per GPU: JAX finds
# the others through Slurm, and gives each process the GPU of its number on the node, so
# ntasks-per-node is the number of GPUs. Two minutes before its time is up the job saves
# and is queued again; where Slurm preempts it, Slurm does both. With pyxis and enroot,
# SDIFF_IMAGE=IMAGE runs the tasks in that container, in this checkout.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f launch/job.sh && -n ${SLURM_JOB_ID:-} ]] || {
  echo "error: submit from the root of the checkout: sbatch launch/slurm.sh --config=..." >&2
  exit 2
}
source launch/common.sh

code=0 late=
trap 'late=1; kill -TERM $$' USR1
# From Slurm 22.05 on, srun does not take this over from sbatch: tasks had one CPU each.
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK-${SLURM_CPUS_PER_TASK-8}}
container=()
[[ -z ${SDIFF_IMAGE:-} ]] || container=(--container-image="$SDIFF_IMAGE"
  --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
# --gpu-bind=none: each process picks its GPU among all of the node's. --label: each line
# of the log starts with the number of its process.
srun --kill-on-bad-exit=1 --gpu-bind=none --label ${container[@]+"${container[@]}"} \
  bash launch/job.sh gpu "$@" &
supervise $! || code=$?
# Not after scancel, which sends SIGTERM without the warning.
[[ -z $late || $code != 75 ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
