#!/usr/bin/env bash
# Check style and types and run all tests; set up the environment first if it is missing. Arguments go to pytest.
#   bash launch/test.sh -k window
#   PYTHON=3.11 bash launch/test.sh    with another Python, in an environment of its own
# The tests always run on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
choose_environment
PYTHON=$PYTHON VENV=$VENV bash launch/setup.sh
export JAX_PLATFORMS=cpu OPENBLAS_NUM_THREADS=1 # both cores already have a test process
unset PYTHONDONTWRITEBYTECODE                    # without compiled files each process would compile what it imports
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/python" -m mypy
# two processes, each with whole files: the tests of a file share compiled programs; tests/conftest.py orders the files
"$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
