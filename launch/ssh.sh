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
failed=()
for i in "${!hosts[@]}"; do
  command=$(worker_command "${CHECKOUT:-~/mvar_jax}" "$coordinator,${#hosts[@]},$i")
  if said=$(on_host "${hosts[i]}" "$command" 2>&1); then
    echo "${hosts[i]}: $said"
  else
    echo "${hosts[i]}: ${said:-not reached}" >&2
    failed+=("${hosts[i]}")
    [ "$verb" = start ] && break # the run needs all of them
  fi
done
[ ${#failed[@]} -eq 0 ] && exit
if [ "$verb" = start ]; then
  verb=stop
  for ((j = 0; j < i; j++)); do
    on_host "${hosts[j]}" "$(worker_command "${CHECKOUT:-~/mvar_jax}")" > /dev/null || true
  done
  verb=start
fi
echo "error: $verb did not succeed on ${failed[*]}; see above" >&2
exit 1
