#!/usr/bin/env bash
# Rehearses a pod on this machine: eight simulated devices, in one process or in several.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

usage() {
  cat <<'EOF'
launch/local.sh [--processes=N] ARGUMENTS...

Runs python -m sdiff_jax.main ARGUMENTS on 8 simulated devices, in one process or in N
(1, 2, 4 or 8) that communicate over 127.0.0.1 as the hosts of a pod would. Any job, any config:

  launch/local.sh --config=configs/digits_diffusion.py --config.mesh.fsdp=8
  launch/local.sh --processes=2 --config=configs/digits_diffusion.py --config.train.steps=50

Ctrl-C or SIGTERM saves a checkpoint and exits with code 75; the same command resumes.
EOF
}

processes=1
case ${1:-} in
  "" | -h | --help) usage; exit ;;
  --processes=*) processes=${1#*=}; shift ;;
esac
[[ $processes =~ ^[1248]$ ]] || die "--processes=$processes: take 1, 2, 4 or 8"

export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$((8 / processes))"
if ((processes > 1)); then
  port=$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
  export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$processes
fi
started=()
for ((i = 0; i < processes; i++)); do
  if ((processes > 1)); then export JAX_PROCESS_ID=$i; fi
  bash launch/job.sh cpu "$@" &
  started+=($!)
done
supervise "${started[@]}"
