#!/usr/bin/env bash
# Style and all tests; sets up .venv first where that is missing. Arguments go to pytest: launch/test.sh -k window
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
export JAX_PLATFORMS=cpu
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# two processes, each with whole files: what they compile is shared by the tests of a file
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
