# shellcheck shell=bash
# Functions of the scripts beside this file; read with `source`.

die() {
  echo "error: $*" >&2
  exit 2
}

# supervise PID...: waits for processes, passes SIGTERM, SIGHUP and Ctrl-C on to them as SIGTERM
# (they save and end), and returns the first code that is not 0; after such a signal 75,
# also where they end well: the same command resumes.
supervise() {
  local pid code result=0 signalled=
  # shellcheck disable=SC2064  # the processes are those of now
  trap "signalled=1; kill -TERM $* 2>/dev/null || true" TERM INT HUP
  for pid in "$@"; do
    # A signal ends `wait` too; asked again, it has the process's own code.
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
    code=0
    wait "$pid" || code=$?
    [[ $result != 0 ]] || result=$code
  done
  trap - TERM INT HUP
  if [[ $signalled ]]; then
    case $result in 0 | 143) result=75 ;; esac # 143: SIGTERM before it could be heard
  fi
  return "$result"
}
