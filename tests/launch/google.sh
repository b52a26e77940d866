#!/usr/bin/env bash
# Stands for gcloud, and for what runs on a pod of two hosts: $GOOGLE holds the pod's state
# (one line an answer, the last one stays), the hosts' homes and all calls.
set -euo pipefail
echo "$*" >>"$GOOGLE/calls"
for word in "$@"; do
  case $word in
    --worker=*) worker=${word#*=} ;;
    --command=*) command=${word#*=} ;;
  esac
done
[[ ${worker:-0} == all ]] && hosts=(0 1) || hosts=("${worker:-0}")
slice=${5:-}
[[ $4 != scp ]] || slice=${6%%:*}
case $slice in
  *-[1-9]) hosts=("${hosts[@]/#/${slice##*-}}") ;; # hosts 10 and 11 are those of slice 1
esac

answer() {
  [[ -f $1 ]] || { echo "ERROR: NOT_FOUND: no such pod" >&2; exit 1; }
  head -n 1 "$1"
  (($(wc -l <"$1") < 2)) || sed -i 1d "$1"
}

case "$3 $4" in
  "queued-resources describe") answer "$GOOGLE/state" ;;
  "tpu-vm describe") echo READY ;;
  "queued-resources create") cp "$GOOGLE/granted" "$GOOGLE/state" ;;
  "queued-resources delete") rm -rf "$GOOGLE/state" "$GOOGLE"/host? ;;
  "tpu-vm scp")
    for host in "${hosts[@]}"; do
      mkdir -p "$GOOGLE/host$host"
      cp "$5" "$GOOGLE/host$host/${6#*:}"
    done
    ;;
  "tpu-vm ssh")
    [[ ! -f $GOOGLE/broken ]] || { rm "$GOOGLE/broken"; exit 255; }
    code=0
    for host in "${hosts[@]}"; do
      (cd "$GOOGLE/host$host" && HOME=$PWD HOST=$host bash -c "$command") || code=$?
    done
    exit "$code"
    ;;
esac
