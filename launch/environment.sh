#!/usr/bin/env bash
# Choose the Python interpreter and the environment folder. The other scripts source this file.
#   PYTHON=3.11 bash launch/test.sh    a version, a name or a path; it gets its own environment, .venv-3.11
# Without PYTHON: the first supported version on the PATH, else of pyenv, in .venv.
set -euo pipefail
SUPPORTED=(3.12 3.11 3.13) # in order of preference

version_of() { # COMMAND: print its Python version, such as 3.12, or nothing
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

find_python() { # VERSION...: print the first interpreter of these versions, or fail
  local version path
  for version in "$@"; do
    for path in "python$version" python3; do
      if [ "$(version_of "$path")" = "$version" ]; then echo "$path" && return; fi
    done
  done
  for version in "$@"; do
    for path in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
      if [ "$(version_of "$path")" = "$version" ]; then echo "$path" && return; fi
    done
  done
  return 1
}

choose_environment() { # set PYTHON and VENV
  local version
  if [ -z "${PYTHON:-}" ]; then
    VENV=${VENV:-.venv}
    PYTHON=$(find_python "${SUPPORTED[@]}") && return
    echo "error: no Python ${SUPPORTED[*]} on the PATH or in pyenv; install one or set PYTHON=/path/to/python" >&2
    exit 2
  fi
  case $PYTHON in
  3.[0-9]*) PYTHON=$(find_python "$PYTHON" || echo "python$PYTHON") ;;
  /*) ;;
  */*) [ "${OLDPWD:-$PWD}" = "$PWD" ] || PYTHON=$OLDPWD/$PYTHON ;; # the scripts have left the folder of their user
  esac
  version=$(version_of "$PYTHON")
  if [[ " ${SUPPORTED[*]} " != *" ${version:-none} "* ]]; then
    echo "error: PYTHON=$PYTHON ${version:+is Python }${version:-does not run}; supported are ${SUPPORTED[*]}" >&2
    exit 2
  fi
  VENV=${VENV:-.venv-$version}
}

need_environment() { # [CHECKOUT]: end with status 2 unless setup.sh has made the environment of this checkout
  [ -x "${1:-.}/.venv/bin/python" ] && return
  echo "error: ${1:+$1/}.venv is missing: run \`bash ${1:+$1/}launch/setup.sh\` first, with EXTRAS=cuda12, cuda13 or tpu for cards" >&2
  exit 2
}
