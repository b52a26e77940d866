#!/usr/bin/env bash
# job.sh KIND ARGUMENTS...: runs python -m sdiff_jax.main ARGUMENTS with the environment
# of launch/env/KIND.env (cpu, gpu or tpu). Each host or device starts one. SIGTERM saves;
# the exit code is then 75, so that no scheduler mistakes a stopped run for a finished one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

kind=${1:-}
[[ -n $kind && -f launch/env/$kind.env ]] || die "give cpu, gpu or tpu, then the job's arguments"
shift
# shellcheck source=/dev/null
source "launch/env/$kind.env"
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python
fi
"$PYTHON" -m sdiff_jax.main "$@" &
supervise $!
