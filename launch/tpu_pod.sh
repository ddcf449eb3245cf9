#!/usr/bin/env bash
# Trains a config on all workers of a TPU VM slice. Run it on your own machine; started again the run goes on.
#   TPU=my-slice ZONE=us-central2-b bash launch/tpu_pod.sh CONFIG WORKDIR [--config.key=value ...]
# Each worker holds this checkout in ~/mvar_jax with .venv made by launch/setup.sh and jax[tpu] in it; WORKDIR and the
# token cache lie on a file system that all workers mount.
set -euo pipefail
if [ $# -lt 2 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then
  echo "error: arguments=$#: expected TPU=NAME ZONE=ZONE and CONFIG WORKDIR [--config.key=value ...]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
command=$(printf '%q ' .venv/bin/python -m mvar_jax train --config "$config" --workdir "$workdir" \
  --distributed auto "$@")
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all --command "cd ~/mvar_jax && exec $command"
