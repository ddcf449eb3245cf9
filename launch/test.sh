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
"$VENV/bin/python" -m mypy & # beside the tests: it keeps one core busy
types=$! status=0
# in memory if there is room: on a disk every fsync is a wait of milliseconds, and the suite has tens of thousands
free_kib=$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print $4 }' || true)
if [ -z "${TMPDIR:-}" ] && [ "${free_kib:-0}" -gt $((4 * 2**20)) ]; then
  TMPDIR=$(mktemp -d /dev/shm/mvar_jax.XXXXXX)
  export TMPDIR
  trap 'rm -rf "$TMPDIR"' EXIT
fi
# each process gets whole files, whose tests share compiled programs; tests/conftest.py orders the files. Three for two
# cores, because one often waits for processes that it started or for a server.
"$VENV/bin/python" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@" || status=$?
wait "$types" && exit "$status"
