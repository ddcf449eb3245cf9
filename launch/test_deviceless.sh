#!/usr/bin/env bash
# Compile the kernels for five kinds of CUDA cards and a TPU v5e, a d16 training step and a d16 sampler for an H100 and a
# v5e, without any of them: the tests marked deviceless. The compilers of this jax (CUDA plugin, libtpu; 250 MB) go into
# VENV/compilers; only these tests see them.
#   PYTHON=3.12 bash launch/test_deviceless.sh                   arguments go to pytest
#   PYTHON=3.12 bash launch/test_deviceless.sh --install_only    the compilers, without the tests
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
choose_environment
PYTHON=$PYTHON VENV=$VENV bash launch/setup.sh

compilers=$("$VENV/bin/python" - <<'P'
import importlib.metadata as metadata
import re

jaxlib = metadata.version("jaxlib")
libtpu = next(re.match(r"libtpu[^;]*", line)[0] for line in metadata.requires("jax") if line.startswith("libtpu"))
print(f"jax-cuda12-plugin=={jaxlib} jax-cuda12-pjrt=={jaxlib} {libtpu}")
P
)
if [ "$(cat "$VENV/compilers/.ready" 2>/dev/null)" != "$compilers" ]; then
  # without their dependencies: the libraries that run programs (3 GB) are not needed to compile them
  # shellcheck disable=SC2086  # one word for each package
  timeout "${INSTALL_SECONDS:-600}" "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
    --upgrade --target "$VENV/compilers" $compilers || { echo "not run: could not install $compilers in time" >&2 && exit 75; }
  echo "$compilers" > "$VENV/compilers/.ready"
fi
[ "${1:-}" != --install_only ] || exit 0
# two test processes compile for the TPU at once; libtpu allows one unless told otherwise
export ALLOW_MULTIPLE_LIBTPU_LOAD=1
export JAX_PLATFORMS=cpu OPENBLAS_NUM_THREADS=1 PYTHONPATH="$VENV/compilers${PYTHONPATH:+:$PYTHONPATH}"
unset PYTHONDONTWRITEBYTECODE
"$VENV/bin/python" -m pytest -n 2 -m deviceless tests/hardware "$@"
