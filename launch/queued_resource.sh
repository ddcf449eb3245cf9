#!/usr/bin/env bash
# Request a TPU slice, train on it from its boot, and request it again after a preemption, until the run is complete.
# Run it on a machine that stays up, for example in tmux; if it ends, the slice trains on, and starting again watches it.
#   export TPU=my-slice ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite
#   export REPOSITORY=https://github.com/me/mvar_jax REVISION=main    where the workers get this code
#   bash launch/queued_resource.sh start CONFIG WORKDIR [--config.key=value ...]
#   bash launch/queued_resource.sh status|log      of the workers, as launch/tpu_pod.sh does
#   bash launch/queued_resource.sh stop            save a checkpoint, then delete the request and the slice
# OPTIONS are more options of `gcloud compute tpus queued-resources create`: --spot unless set, such as
# "--reserved --service-account=NAME". WORKDIR and the token cache are in a bucket (gs://...) that the workers may write.
# It ends with the status of the run: 0 complete, 1 failed, 2 refused, 75 stopped. The slice costs until it is deleted.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/workers.sh
read_verb "bash launch/queued_resource.sh" "$@"
for name in TPU ZONE TYPE VERSION REPOSITORY; do
  case "$verb $name" in start* | *TPU | *ZONE) ;; *) continue ;; esac
  if [ -z "${!name:-}" ]; then
    echo "error: $name is required in the environment; the first lines of launch/queued_resource.sh show an example" >&2
    exit 2
  fi
done
CHECKOUT=${CHECKOUT:-/opt/mvar_jax} # the startup script runs as root
read -ra options <<< "${OPTIONS---spot}"

queued_resources() { # VERB [OPTIONS...]: the queued resource has the name of its slice
  gcloud compute tpus queued-resources "$1" "$TPU" --zone "$ZONE" "${@:2}"
}

describe() { # FIELD: print it; what gcloud says on stderr goes into a file, because notices are not part of the field
  queued_resources describe --format "value($1)" 2> "$temporary/stderr"
}

is_missing() { # whether describe failed because there is no request
  grep -q NOT_FOUND "$temporary/stderr"
}

on_workers() { # VERB: of launch/tpu_pod.sh
  CHECKOUT=$CHECKOUT SUDO=sudo bash launch/tpu_pod.sh "$1"
}

delete() {
  queued_resources delete --force --quiet
}

startup_script() { # what each worker runs at boot
  echo '#!/usr/bin/env bash'
  printf '%s=%q\n' CHECKOUT "$CHECKOUT" REPOSITORY "$REPOSITORY" REVISION "${REVISION:-HEAD}"
  printf 'command=('
  printf '%q ' "${training[@]}" auto
  printf ')\n'
  cat launch/tpu_startup.sh
}

create() { # the metadata training lets a later start tell whether the request is that of its run
  startup_script > "$temporary/startup"
  echo "$wanted" > "$temporary/training"
  echo "requesting $TYPE as $TPU in $ZONE"
  queued_resources create --node-id "$TPU" --accelerator-type "$TYPE" --runtime-version "$VERSION" \
    --metadata-from-file "startup-script=$temporary/startup,training=$temporary/training" "${options[@]}"
}

request_again() { # STATE: SUSPENDED, or DELETED if only the new request is missing
  [ "$1" = DELETED ] || delete || return
  create
}

watch() { # until the run has ended; a slice that was taken away is requested again
  local state said before="" waited_s=0 is_taken=""
  while true; do
    if ! state=$(describe state.state); then
      if ! is_missing; then
        cat "$temporary/stderr" >&2 # the network, for example
        state=unknown
      elif [ -n "$is_taken" ]; then
        state=DELETED # by this watch
      else
        echo "error: the request of $TPU is gone" >&2
        return 1
      fi
    fi
    case $state in
    SUSPENDED | DELETING | DELETED | unknown) ;;
    *) is_taken="" ;; # requested again, even if gcloud lost the answer
    esac
    said=$state
    case $state in
    ACTIVE)
      said=$(WORKER=0 on_workers status 2> /dev/null) || said="none: not reached"
      case $said in
      complete*) echo "$said; delete the slice: bash launch/queued_resource.sh stop" && return 0 ;;
      stopped*) echo "$said" && return 75 ;;
      refused*) echo "error: $said; see bash launch/queued_resource.sh log" >&2 && return 2 ;;
      failed* | interrupted*) echo "error: $said; see bash launch/queued_resource.sh log" >&2 && return 1 ;;
      none* | lost*)
        waited_s=$((waited_s + INTERVAL))
        if [ "$waited_s" -gt "$SETUP_SECONDS" ]; then
          echo "error: worker 0 does not start, see its journalctl -u google-startup-scripts; the slice still costs" >&2
          return 1
        fi
        ;;
      *) waited_s=0 ;;
      esac
      ;;
    SUSPENDED | DELETED)
      [ "$state" = DELETED ] || echo "$TPU was taken away"
      is_taken=1 waited_s=0
      if request_again "$state"; then
        is_taken=""
      else
        echo "requesting $TPU again failed, see above; it is tried again in $INTERVAL s" >&2
      fi
      ;;
    FAILED)
      queued_resources describe >&2 || true
      echo "error: $TPU cannot be had, see above; delete the request: bash launch/queued_resource.sh stop" >&2
      return 1
      ;;
    esac
    [ "$said" = "$before" ] || echo "$said"
    before=$said
    sleep "$INTERVAL"
  done
}

case $verb in
status | log) on_workers "$verb" ;;
stop)
  on_workers stop || echo "the workers could not be reached; what they did not save is lost" >&2
  delete
  ;;
start)
  INTERVAL=${INTERVAL:-60} SETUP_SECONDS=${SETUP_SECONDS:-1800}
  temporary=$(mktemp -d)
  trap 'rm -rf "$temporary"' EXIT
  wanted=$(printf ' %q' "${@:2}")
  wanted=${wanted# }
  if made_for=$(describe 'tpu.nodeSpec[0].node.metadata.training'); then
    if [ -z "$made_for" ]; then
      echo "the existing request of $TPU is watched; until it is taken away it trains what it was created for" >&2
    elif [ "$made_for" != "$wanted" ]; then
      echo "error: $TPU was requested for: start $made_for; stop it or choose another TPU for: start $wanted" >&2
      exit 2
    fi
  elif is_missing; then
    create
  else
    cat "$temporary/stderr" >&2
    echo "error: gcloud cannot say whether $TPU is requested, see above" >&2
    exit 1
  fi
  watch
  ;;
esac
