#!/usr/bin/env bash
# Set up a TPU VM and train, at every boot: the startup script that launch/queued_resource.sh gives to a slice. It puts
# CHECKOUT, REPOSITORY, REVISION and the array command in front.
set -euo pipefail
export HOME=${HOME:-/root} # startup scripts run as root, without a home folder
[ -d "$CHECKOUT/.git" ] || git clone --quiet "$REPOSITORY" "$CHECKOUT"
cd "$CHECKOUT"
git fetch --quiet origin "$REVISION"
git checkout --quiet --detach FETCH_HEAD
source launch/environment.sh
if ! find_python "${SUPPORTED[@]}" > /dev/null; then # images of TPU VMs have 3.10
  add-apt-repository -y ppa:deadsnakes/ppa
  apt-get install -y python3.12-venv
fi
EXTRAS=tpu bash launch/setup.sh
# shellcheck disable=SC2154  # command is what queued_resource.sh puts in front
exec .venv/bin/python launch/supervise.py run "runs/workers/$(hostname)" -- "${command[@]}"
