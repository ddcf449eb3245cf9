#!/usr/bin/env bash
# What the machines of a run are told. The scripts that start a run on several machines source this file.
# On each, launch/supervise.py runs the training apart from the terminal, with a log in runs/workers/HOSTNAME.
set -euo pipefail

read_verb() { # HOW-TO VERB [CONFIG WORKDIR OPTIONS...]: set verb, and for start the array training
  local usage=$1
  shift
  verb=${1:-}
  case $verb in
  start)
    if [ $# -lt 3 ]; then
      echo "error: CONFIG and WORKDIR are required: $usage start CONFIG WORKDIR [--config.key=value ...]" >&2
      exit 2
    fi
    training=(.venv/bin/python -m mvar_jax train --config "$2" --workdir "$3" "${@:4}" --distributed)
    ;;
  status | log | stop)
    [ $# -eq 1 ] && return
    echo "error: $verb takes no more words, got ${*:2}" >&2
    exit 2
    ;;
  *)
    echo "error: the first word must be start, status, log or stop, got ${verb:-none}: $usage start CONFIG WORKDIR" >&2
    exit 2
    ;;
  esac
}

worker_command() { # FOLDER [WORDS of --distributed]: print what a worker runs; FOLDER is its checkout
  local more=()
  [ "$verb" = start ] && more=(-- "${training[@]}" "$2")
  [ "$verb" = log ] && more=(--follow)
  # shellcheck disable=SC2016  # the hostname is the worker's: its checkout may lie in a home folder that all share
  printf 'cd %s && bash -c "source launch/environment.sh; need_environment" && %s.venv/bin/python launch/supervise.py %s "runs/workers/$(hostname)"' "$1" "${SUDO:+$SUDO }" "$verb"
  [ ${#more[@]} -eq 0 ] || printf ' %q' "${more[@]}"
}
