#!/usr/bin/env bash
# Train a config on all cards of this machine, or on the CPU if it has none. Resumable: rerunning continues.
# Relative paths are those of the folder where you are; a shipped config is found from any folder.
# Needs .venv from `bash launch/setup.sh`, with EXTRAS=cuda12, cuda13 or tpu for cards.
#   bash launch/local.sh CONFIG WORKDIR [--config.key=value ...]
#   bash launch/local.sh configs/imagenet256_d16.py runs/d16 --config.batch_size=64 --config.accumulate_steps=4
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "error: CONFIG and WORKDIR are required: bash launch/local.sh CONFIG WORKDIR [--config.key=value ...]" >&2
  exit 2
fi
config=$1 workdir=$2
shift 2
checkout=$(cd "$(dirname "$0")/.." && pwd)
source "$checkout/launch/environment.sh"
need_environment "$checkout"
# PYTHONSAFEPATH: a folder mvar_jax where you are, such as the checkout itself, must not hide the package
PYTHONSAFEPATH=1 exec "$checkout/.venv/bin/python" -m mvar_jax train --config "$config" --workdir "$workdir" "$@"
