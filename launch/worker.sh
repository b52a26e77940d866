#!/usr/bin/env bash
# worker.sh COMMAND: one host's part of tpu_pod.sh. The job is a process of its own, which
# outlives the connection that started it; ~/sdiff_job holds its log, number and code.
#   setup BUCKET     installs the package and mounts the bucket as runs/
#   start ARGUMENTS  starts the job
#   follow           prints the log until the job has ended
#   code             prints `ended CODE` when the job has ended; 0 after `stop`
#   made ARGUMENTS   prints `made NUMBER`, which changes with what the job has finished
#   stop             SIGTERM: the job saves and ends
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
job=${SDIFF_JOB:-$HOME/sdiff_job}

setup() {
  local bucket=$1
  export PATH=$HOME/.local/bin:$PATH
  # The hosts' own Python may be too old (3.10), and may hold other frameworks.
  command -v uv >/dev/null || retry install_uv
  [[ -x .venv/bin/python ]] || retry uv venv --quiet --python 3.12 .venv
  retry uv pip install --quiet --python .venv/bin/python --requirement launch/lock/tpu.txt
  uv pip install --quiet --python .venv/bin/python --no-deps --editable .
  command -v gcsfuse >/dev/null || retry install_gcsfuse
  # JAX asks for it on v5e and newer: it starts and ends faster.
  echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null ||
    echo "transparent huge pages stay off" >&2
  mkdir -p runs
  # Without caches of names: what one host writes the others must find at once.
  mountpoint --quiet runs || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$bucket" "$PWD/runs"
  .venv/bin/python -c 'import jax; print("jax", jax.__version__)'
}

# retry COMMAND...: up to five times, since all hosts of a pod ask at once.
retry() {
  local try
  for ((try = 1; try < 5; try++)); do
    ! "$@" || return 0
    sleep "${SDIFF_POLL:-$((10 * try + RANDOM % 10))}"
  done
  "$@"
}

install_uv() { curl -LsSf https://astral.sh/uv/install.sh | sh; }

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
  local code=0 kept uploads
  kept=runs/.logs/$(date +%Y%m%d-%H%M%S)-$(hostname).log
  echo $$ >"$job/pid.new" && mv "$job/pid.new" "$job/pid"
  mkdir -p runs/.logs
  # The log outlives the host: in the bucket each minute, and at the end.
  while sleep "${SDIFF_POLL:-60}"; do cp "$job/log" "$kept"; done &
  uploads=$!
  bash launch/job.sh tpu "$@" &
  supervise $! || code=$?
  kill "$uploads"
  cp "$job/log" "$kept" || true
  echo "$code" >"$job/code"
}

made() {
  local folder='' argument words
  for argument in "$@"; do
    case $argument in
      --workdir=*) folder=${argument#*=} && break ;;
      --config=*) # runs/X_words of configs/X.py:words
        folder=$(basename "${argument#*=}")
        words=${folder#*.py}
        words=${words#:}
        folder=runs/${folder%%.py*}${words:+_${words//,/_}}
        ;;
    esac
  done
  echo "made $(find "$folder"/{checkpoints,samples.parts,images} -maxdepth 1 2>/dev/null | sort | cksum)"
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
  setup | start | follow | code | made | stop | _job) "$@" ;;
  *) die "give setup, start, follow, code, made or stop" ;;
esac
