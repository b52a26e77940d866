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
# and is queued again; where Slurm preempts it, Slurm does both.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f launch/job.sh && -n ${SLURM_JOB_ID:-} ]] || {
  echo "error: submit from the root of the checkout: sbatch launch/slurm.sh --config=..." >&2
  exit 2
}
source launch/common.sh

code=0 late=
trap 'late=1; kill -TERM $$' USR1
# --gpu-bind=none: each process picks its GPU among all of the node's.
srun --kill-on-bad-exit=1 --gpu-bind=none bash launch/job.sh gpu "$@" &
supervise $! || code=$?
# Not after scancel, which sends SIGTERM without the warning.
[[ -z $late || $code != 75 ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
