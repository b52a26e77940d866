#!/usr/bin/env bash
# worker.sh COMMAND: one host's part of tpu_pod.sh. The job is a process of its own, which
# outlives the connection that started it; ~/sdiff_job holds its log, number and code.
#   setup BUCKET     installs the package and mounts the bucket as runs/
#   start ARGUMENTS  starts the job
#   follow           prints the log until the job has ended
#   code             prints `ended CODE` when the job has ended; 0 after `stop`
#   stop             SIGTERM: the job saves and ends
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
job=${SDIFF_JOB:-$HOME/sdiff_job}

setup() {
  local bucket=$1
  export PATH=$HOME/.local/bin:$PATH
  # The hosts' own Python may be too old (3.10), and may hold other frameworks.
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
  [[ -x .venv/bin/python ]] || uv venv --quiet --python 3.12 .venv
  uv pip install --quiet --python .venv/bin/python --editable '.[tpu]'
  command -v gcsfuse >/dev/null || install_gcsfuse
  mkdir -p runs
  # Without caches of names: what one host writes the others must find at once.
  mountpoint --quiet runs || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$bucket" "$PWD/runs"
  .venv/bin/python -c 'import jax; print("jax", jax.__version__)'
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
  curl -fsS $url/doc/apt-key.gpg | sudo tee $key >/dev/null
  echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update --quiet=2
  sudo apt-get install --quiet=2 --yes gcsfuse
}

runs() { [[ -f $job/pid ]] && kill -0 "$(cat "$job/pid")" 2>/dev/null; }

start() {
  ! runs || die "a job runs on this host already: follow its logs, or stop it first"
  rm -rf "$job"
  mkdir -p "$job"
  setsid --fork bash launch/worker.sh _job "$@" >"$job/log" 2>&1 </dev/null
  until [[ -f $job/pid ]]; do sleep 0.1; done
}

_job() {
  local code=0
  echo $$ >"$job/pid.new" && mv "$job/pid.new" "$job/pid"
  bash launch/job.sh tpu "$@" &
  supervise $! || code=$?
  echo "$code" >"$job/code"
}

follow() {
  [[ -f $job/pid ]] || die "no job was started on this host"
  tail --lines=+1 --follow --sleep-interval=0.2 --pid="$(cat "$job/pid")" "$job/log"
}

code() {
  local end
  while runs; do sleep 0.2; done
  end=$(cat "$job/code" 2>/dev/null || echo 75) # no code: the host itself went down
  [[ $end != 75 || ! -f $job/stop ]] || end=0
  echo "ended $end"
}

stop() {
  runs || return 0
  touch "$job/stop"
  kill -TERM "$(cat "$job/pid")"
  while runs; do sleep 0.2; done
}

case ${1:-} in
  setup | start | follow | code | stop | _job) "$@" ;;
  *) die "give setup, start, follow, code or stop" ;;
esac
