#!/usr/bin/env bash
# Train a config on several machines that ssh reaches, one process each with all its cards, apart from this terminal.
#   export HOSTS="node1 node2 user@node3"
#   bash launch/ssh.sh start CONFIG WORKDIR [--config.key=value ...]    resumable: starting again continues
#   bash launch/ssh.sh status        one line for each host
#   bash launch/ssh.sh log           follow the log of the first host, or of HOSTS="node2"
#   bash launch/ssh.sh stop          save a checkpoint and end
# Each host needs this checkout in ~/mvar_jax with `EXTRAS=cuda12 bash launch/setup.sh` run there, and sees WORKDIR and
# the token cache at the same path. The processes meet at port 8476 of the first host; COORDINATOR=ADDRESS:PORT chooses
# another, for example if ssh's name for a host is not the one of its network. Keys must let ssh in without a password.
# A run that stopped early (status 75) is continued by the hosts themselves; a host that was rebooted is not started
# again: stop the others and start.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/workers.sh
read_verb 'HOSTS="NODE1 NODE2" bash launch/ssh.sh' "$@"
read -ra hosts <<< "${HOSTS:-}"
if [ ${#hosts[@]} -eq 0 ]; then
  echo "error: HOSTS is required in the environment: HOSTS=\"NODE1 NODE2\" bash launch/ssh.sh $verb" >&2
  exit 2
fi
coordinator=${COORDINATOR:-${hosts[0]#*@}:8476}

on_host() { # HOST COMMAND
  ssh -n -o BatchMode=yes -o ConnectTimeout=20 "$1" "$2"
}

if [ "$verb" = log ]; then
  on_host "${hosts[0]}" "$(worker_command "${CHECKOUT:-~/mvar_jax}")"
  exit
fi
ask() { # VERB HOST...: ask all hosts at once, because the processes of a run end together; fail if a host does
  local verb=$1 answers i failed=()
  shift
  answers=$(mktemp -d)
  for ((i = 1; i <= $#; i++)); do
    on_host "${!i}" "$(worker_command "${CHECKOUT:-~/mvar_jax}")" > "$answers/$i" 2>&1 || touch "$answers/$i.failed" &
  done
  wait
  for ((i = 1; i <= $#; i++)); do
    if [ -e "$answers/$i.failed" ]; then
      [ -s "$answers/$i" ] || echo "not reached" > "$answers/$i"
      failed+=("${!i}")
      echo "${!i}: $(cat "$answers/$i")" >&2
    else
      echo "${!i}: $(cat "$answers/$i")"
    fi
  done
  rm -rf "$answers"
  [ ${#failed[@]} -eq 0 ] && return
  echo "error: $verb did not succeed on ${failed[*]}; see above" >&2
  return 1
}

if [ "$verb" != start ]; then
  ask "$verb" "${hosts[@]}"
  exit
fi
for i in "${!hosts[@]}"; do
  command=$(worker_command "${CHECKOUT:-~/mvar_jax}" "$coordinator,${#hosts[@]},$i")
  if said=$(on_host "${hosts[i]}" "$command" 2>&1); then
    echo "${hosts[i]}: $said"
    continue
  fi
  echo "${hosts[i]}: ${said:-not reached}" >&2
  ask stop "${hosts[@]:0:i}" > /dev/null 2>&1 || true # the run needs all of them
  echo "error: start did not succeed on ${hosts[i]}; see above" >&2
  exit 1
done
