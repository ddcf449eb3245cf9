#!/usr/bin/env bash
# Style and all tests; sets up .venv first where that is missing. Arguments go to pytest: launch/test.sh -k window
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh
export JAX_PLATFORMS=cpu OPENBLAS_NUM_THREADS=1 # both cores have a test process already
unset PYTHONDONTWRITEBYTECODE                    # installed uncompiled: each process would compile what it imports anew
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# two processes, each with whole files: what they compile is shared by the tests of a file; tests/conftest.py orders them
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
