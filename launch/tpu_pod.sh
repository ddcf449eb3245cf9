#!/usr/bin/env bash
# Train a config on all workers of a TPU VM slice. Run it on your own machine. Resumable: rerunning continues.
#   TPU=my-slice ZONE=us-central2-b bash launch/tpu_pod.sh CONFIG WORKDIR [--config.key=value ...]
# Each worker needs this checkout in ~/mvar_jax, with `EXTRAS=tpu bash launch/setup.sh` run there. WORKDIR and the token
# cache are on a file system that all workers mount.
set -euo pipefail
if [ $# -lt 2 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then
  echo "error: CONFIG and WORKDIR are required, and TPU and ZONE in the environment: TPU=NAME ZONE=ZONE bash launch/tpu_pod.sh CONFIG WORKDIR" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
command=$(printf '%q ' .venv/bin/python -m mvar_jax train --config "$config" --workdir "$workdir" \
  --distributed auto "$@")
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all --command "cd ~/mvar_jax && exec $command"
