#!/usr/bin/env bash
# Train a config on all workers of a TPU VM slice, apart from this terminal. Run it on your own machine.
#   export TPU=my-slice ZONE=us-central2-b
#   bash launch/tpu_pod.sh start CONFIG WORKDIR [--config.key=value ...]    resumable: starting again continues
#   bash launch/tpu_pod.sh status        one line for each worker
#   bash launch/tpu_pod.sh log           follow the log of a worker: 0, or WORKER=3
#   bash launch/tpu_pod.sh stop          save a checkpoint and end
# Each worker needs this checkout in ~/mvar_jax, with `EXTRAS=tpu bash launch/setup.sh` run there. WORKDIR and the token
# cache are in a bucket (gs://...) or on a file system that all workers mount. A run that stopped early (status 75) is
# continued by the workers themselves; a slice that is deleted or rebooted needs launch/queued_resource.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/workers.sh
read_verb "TPU=NAME ZONE=ZONE bash launch/tpu_pod.sh" "$@"
if [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then
  echo "error: TPU and ZONE are required in the environment: TPU=NAME ZONE=ZONE bash launch/tpu_pod.sh $verb" >&2
  exit 2
fi
worker=all
[ "$verb" != log ] || worker=0
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker "${WORKER:-$worker}" \
  --command "$(worker_command "${CHECKOUT:-~/mvar_jax}" auto)"
