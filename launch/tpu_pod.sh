#!/usr/bin/env bash
# From nothing to a finished run on a Cloud TPU pod; see --help and README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh

usage() {
  cat <<'EOF'
launch/tpu_pod.sh COMMAND OPTIONS... [-- ARGUMENTS OF python -m sdiff_jax.main]

Commands:
  all      create, setup, run, delete; after a preemption it creates a pod again and
           resumes, and after a failure as well if the job had got on since its start
  create   ask for the pod (a queued resource) and wait until it is there
  setup    install this working tree (or --git) on all hosts, mount the bucket as runs/
  run      start the job on all hosts, follow it and return its code
  logs     follow the log of host 0 (or --worker)
  stop     SIGTERM on all hosts: the job saves and ends
  delete   give the pod back; nothing costs any more but the bucket

Options:
  --zone=ZONE        required: where the pod stands, europe-west4-b
  --type=TYPE        for create: v4-8, v5litepod-256, v5p-256, v6e-256, ... (v4 and v5p
                     count cores, two a chip)
  --bucket=NAME      for setup: bucket for runs and compiled programs, without gs://
  --name=NAME        of the pod; sdiff unless given
  --project=PROJECT  gcloud's own unless given
  --slices=N         of that type, in one job (1)
  --spot             cheaper, and may be taken away at any time
  --git=URL          install from there, at --ref=BRANCH, TAG or COMMIT (main)
  --runtime=VERSION  of the hosts' image; found from the type unless given
  --wait=HOURS       until the request is withdrawn (24)
  --restarts=N       after preemptions and failures (100)
  --keep             all: do not delete the pod at the end
  --worker=N         logs: of host N
  --create-flag=FLAG one more for `gcloud ... queued-resources create`; may be repeated
  --dry-run          print every command instead of running it

Example:
  launch/tpu_pod.sh all --zone=europe-west4-b --type=v5litepod-256 --bucket=my-runs --spot \
    -- --config=configs/digits_diffusion.py --config.train.batch_size=256
EOF
}

name=sdiff zone='' type='' bucket='' project='' spot='' git='' ref=main runtime=''
hours=24 restarts=100 slices=1 keep='' worker=0 dry='' create_flags=()
poll=${SDIFF_POLL:-30} # seconds between two questions to Google
remote='bash sdiff_jax/launch/worker.sh'
tree=${TMPDIR:-/tmp}/sdiff_jax.tgz

say() { echo "$name: $*" >&2; }

# The words as a shell would take them.
quoted() {
  local word words='' escaped="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/$escaped}'"
    words+="$word "
  done
  echo "${words% }"
}

run() { if [[ $dry ]]; then quoted "$@" >&3; else "$@"; fi; }

tpus() { run gcloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"} --quiet; }

# The names of the slices.
nodes() { if ((slices == 1)); then echo "$name"; else seq -f "$name-%g" 0 $((slices - 1)); fi; }

# on WORKER COMMAND: on all hosts of all slices, or on one host of the first.
on() {
  local node
  for node in $(nodes); do
    tpus tpu-vm ssh "$node" --worker="$1" --command="$2" || return
    [[ $1 == all ]] || break
  done
}

# state KIND NAME FIELD ASSUMED: what Google says of it, NOT_FOUND, or UNKNOWN where it
# cannot be asked; ASSUMED in a dry run.
state() {
  local said
  if said=$(tpus "$1" describe "$2" --format="value($3)" 2>"$errors"); then
    echo "${said:-$4}"
  elif grep -q NOT_FOUND "$errors"; then
    echo NOT_FOUND
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
}

request_state() { state queued-resources "$name" state.state "$1"; }

is_lost() {
  local node
  case $(request_state ACTIVE) in SUSPENDING | SUSPENDED | FAILED | NOT_FOUND) return 0 ;; esac
  for node in $(nodes); do
    case $(state tpu-vm "$node" state READY) in
      PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING | NOT_FOUND) return 0 ;;
    esac
  done
  return 1
}

request() {
  local names=(--node-id="$name")
  ((slices == 1)) || names=(--node-count="$slices" --node-prefix="$name")
  tpus queued-resources create "$name" "${names[@]}" --accelerator-type="$type" \
    --runtime-version="$runtime" --valid-until-duration="${hours}h" ${spot:+--spot} \
    ${create_flags[@]+"${create_flags[@]}"} || die "gcloud refused the request, see above"
}

create() {
  case $(request_state NOT_FOUND) in
    NOT_FOUND) request ;;
    UNKNOWN) die "gcloud cannot be asked for the pod, see above" ;;
    ACTIVE) ! is_lost || { delete && request; } ;;
    SUSPENDING | SUSPENDED | FAILED) delete && request ;;
  esac
  await
}

await() {
  local begun=$SECONDS now
  while true; do
    now=$(request_state ACTIVE)
    case $now in
      ACTIVE) return ;;
      SUSPENDING | SUSPENDED | FAILED | NOT_FOUND) say "the request ended: $now"; return 1 ;;
    esac
    if ((SECONDS - begun >= hours * 3600)); then
      delete || true
      die "no pod in $hours hours, the request is withdrawn; try another --zone, or --spot"
    fi
    say "$now, $(((SECONDS - begun) / 60)) of $((hours * 60)) minutes"
    sleep "$poll"
  done
}

setup() {
  local install node
  install="bash launch/worker.sh setup $(quoted "$bucket")"
  if [[ $git ]]; then
    on all "mkdir -p sdiff_jax && cd sdiff_jax && git init --quiet &&\
 git fetch --quiet --depth=1 $(quoted "$git" "$ref") && git checkout --quiet --force FETCH_HEAD && $install"
  else
    run tar -czf "$tree" --exclude=./.git --exclude='./.venv*' --exclude=./runs \
      --exclude=./data . || return
    for node in $(nodes); do
      tpus tpu-vm scp "$tree" "$node:sdiff_jax.tgz" --worker=all || return
    done
    on all "mkdir -p sdiff_jax && tar -xzf sdiff_jax.tgz -C sdiff_jax && cd sdiff_jax && $install"
  fi
}

start() { on all "$remote start $(quoted "$@")"; }

# Follows the job to its end and returns its code; 75 where it is to go on, on a new pod
# if this one is lost.
follow() {
  local codes code failures=0
  while true; do
    if on 0 "$remote follow" && codes=$(on all "$remote code"); then
      code=$(sed -n 's/^ended //p' <<<"$codes" | sort -n | tail -n 1)
      # Where one host says that the command is wrong, the others fail otherwise.
      ! grep -qx 'ended 2' <<<"$codes" || code=2
      code=${code:-0} # a dry run
      ((code == 0)) || on all "tail -n 20 sdiff_job/log" >&2 || true
      return "$code"
    fi
    ! is_lost || return 75
    # The job continues by itself when only the connection broke.
    ((++failures < 100)) || die "no connection to the pod, which may still run: try logs, or delete"
    say "no connection, trying again"
    sleep "$poll"
  done
}

delete() { tpus queued-resources delete "$name" --force; }

# What the job has finished so far, as a number; "" where that cannot be asked.
made() { on 0 "$remote made $(quoted "$@")" 2>/dev/null | sed -n 's/^made //p' || true; }

all() {
  local code=0 try before why=''
  for ((try = 0; try <= restarts; try++)); do
    if [[ $why ]]; then
      say "$why, restart $try of $restarts"
      sleep "$poll"
    fi
    code=0 before=''
    { create && setup && before=$(made "$@") && start "$@" && follow; } || code=$?
    ((code != 0 && code != 2)) || break
    # The hosts die, or end their jobs, before Google says that they are gone.
    [[ $code == 75 ]] || sleep "$poll"
    why=lost
    if [[ $code != 75 ]] && ! is_lost; then
      # The job itself failed: again, unless it has finished nothing since its start.
      [[ $(made "$@") != "$before" ]] || break
      why="failed with code $code"
    fi
  done
  if [[ $keep ]]; then
    say "kept, and paid for until: launch/tpu_pod.sh delete --name=$name --zone=$zone"
  else
    delete || say "NOT deleted, and paid for: see above"
  fi
  return "$code"
}

left() {
  say "left as it is, and paid for; go on with logs, stop or delete, --name=$name --zone=$zone"
  exit 130
}

runtime_of() {
  case $1 in
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    tpu7x* | v7x*) die "--type=$1: the Cloud TPU API does not have it; use GKE, see README.md" ;;
    *) die "--type=$1: unknown; give its --runtime as well" ;;
  esac
}

command=${1:-}
case $command in
  all | create | setup | run | logs | stop | delete) shift ;;
  '' | -h | --help | help) usage; exit ;;
  *) die "unknown command $command; see launch/tpu_pod.sh --help" ;;
esac
while (($#)); do
  case $1 in
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) spot=1 ;;
    --git=*) git=${1#*=} ;;
    --ref=*) ref=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --wait=*) hours=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --keep) keep=1 ;;
    --worker=*) worker=${1#*=} ;;
    --create-flag=*) create_flags+=("${1#*=}") ;;
    --dry-run) dry=1 ;;
    -h | --help) usage; exit ;;
    --) shift; break ;;
    *) die "unknown option $1; see --help; the job's own arguments come after --" ;;
  esac
  shift
done

[[ $zone ]] || die "--zone is missing: where the pod stands, as --zone=europe-west4-b"
[[ $hours$restarts$slices =~ ^[0-9]+$ ]] || die "--wait, --restarts and --slices take whole numbers"
[[ $slices != 0 ]] || die "--slices=0: must be at least 1"
case $command in all | create)
  [[ $type ]] || die "--type is missing: the kind and size of the pod, as --type=v5p-256"
  [[ $runtime ]] || runtime=$(runtime_of "$type")
  ;;
esac
case $command in all | setup)
  [[ $bucket ]] || die "--bucket is missing: all hosts write into one, as --bucket=my-runs"
  bucket=${bucket#gs://} bucket=${bucket%/}
  ;;
esac
case $command in all | run)
  (($#)) || die "the job's arguments are missing: -- --config=configs/X.py ..."
  ;;
esac
[[ $dry ]] || command -v gcloud >/dev/null ||
  die "gcloud is missing: install the Google Cloud CLI, then gcloud auth login"

exec 3>&1
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
trap left INT TERM
case $command in
  all) all "$@" ;;
  run) start "$@" && follow ;;
  logs) on "$worker" "$remote follow" ;;
  stop) on all "$remote stop" ;;
  *) "$command" ;;
esac
