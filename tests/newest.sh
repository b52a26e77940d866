#!/usr/bin/env bash
# Runs the tests on the newest Python and JAX: tests/newest.sh [ARGUMENTS OF PYTEST]
#
# The Python is NEWEST_PYTHON, or the newest from 3.12 on that is on the PATH or that
# pyenv has installed. If there is none, or NEWEST_PYTHON is `debian`, that of Debian's
# unstable distribution is installed into .venv-newest-root (root and debootstrap are
# needed), and the tests run there in a chroot, with this repository mounted.
set -euo pipefail

cd "$(dirname "$0")/.."
repository=$PWD
root=$repository/.venv-newest-root
if (($#)); then arguments=("$@"); else arguments=(-m "not slow"); fi

newest_python() {
  local minor python
  for minor in 16 15 14 13 12; do
    for python in "python3.$minor" "$HOME"/.pyenv/versions/3."$minor".*/bin/python; do
      if "$python" --version > /dev/null 2>&1; then
        echo "$python"
        return
      fi
    done
  done
}

# setup.py bounds JAX; the question here is whether its bound could be raised.
install_and_test() {
  local python=$1 environment=$2
  shift 2
  [[ -e $environment ]] || "$python" -m venv "$environment"
  "$environment/bin/pip" install --quiet --editable .
  "$environment/bin/pip" install --quiet --upgrade jax jaxlib
  local requirement
  while read -r requirement; do  # one by one: some have no wheels for a new Python yet
    "$environment/bin/pip" install --quiet --only-binary=:all: "$requirement" ||
      echo "not available: $requirement" >&2
  done < <("$environment/bin/python" -c '
import importlib.metadata
for requirement in importlib.metadata.requires("sdiff_jax"):
  name, _, marker = requirement.partition("; ")
  if marker == "extra == \"test\"":
    print(name)')
  "$environment/bin/python" -c \
    'import sys, jax; print("Python", sys.version.split()[0], "JAX", jax.__version__)'
  local ignored=()
  "$environment/bin/python" -c 'import gym_pusht' 2> /dev/null ||
    ignored=(--ignore=tests/policies --ignore=tests/jobs/test_{demos,rollout}.py)
  "$environment/bin/python" -m pytest -p no:cacheprovider "${ignored[@]}" "$@"
}

python=${NEWEST_PYTHON:-$(newest_python)}
if [[ -n $python && $python != debian ]]; then
  install_and_test "$python" "$repository/.venv-newest" "${arguments[@]}"
  exit
fi

if ! command -v debootstrap > /dev/null || ((EUID)); then
  echo "error: there is no Python newer than $(python3 --version); install one, or run" \
    "this as root with debootstrap" >&2
  exit 2
fi
if [[ ! -e $root/complete ]]; then
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates,git \
    sid "$root"
  touch "$root/complete"
fi
cp /etc/resolv.conf "$root/etc/resolv.conf"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
mkdir -p "$root/repository"
unmount() { umount "$root/repository" "$root/proc" "$root/dev"; }
trap unmount EXIT
mount --bind "$repository" "$root/repository"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
env --unset=PIP_FIND_LINKS --unset=PIP_CONSTRAINT \
  HOME=/root PIP_CONFIG_FILE=/dev/null \
  chroot "$root" bash -c "
    set -euo pipefail
    cd /repository
    $(declare -f install_and_test)
    install_and_test python3 /opt/venv \"\$@\"" install_and_test "${arguments[@]}"
