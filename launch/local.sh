#!/usr/bin/env bash
# Trains a config on this machine: all its cards, or the CPU where there is none. Started again it goes on.
#   bash launch/local.sh CONFIG WORKDIR [--config.key=value ...]
#   bash launch/local.sh configs/imagenet256_d16.py runs/d16 --config.batch_size=64 --config.accumulate_steps=4
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 2 ]; then
  echo "error: arguments=$#: expected CONFIG WORKDIR [--config.key=value ...]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
exec .venv/bin/python -m mvar_jax train --config "$config" --workdir "$workdir" "$@"
