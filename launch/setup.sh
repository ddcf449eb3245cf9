#!/usr/bin/env bash
# Create the environment of requirements.txt and this package beside the repository's files: .venv, or .venv-3.X with
# PYTHON=3.X. Does nothing if that is already done.
#   EXTRAS=cuda12 bash launch/setup.sh    adds jax[cuda12]; or cuda13, tpu. Later calls without EXTRAS keep it.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
choose_environment

EXTRAS=${EXTRAS-$(cut -d' ' -f3 "$VENV/.ready" 2>/dev/null || true)}
wanted="$(cat requirements.txt pyproject.toml setup.py | cksum) $EXTRAS"
if [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/.ready" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi
echo "setting up $VENV with $("$PYTHON" --version) (about 2 GB${EXTRAS:+ and jax[$EXTRAS]}; a minute or two)"
"$PYTHON" -m venv "$VENV"
# the pip that comes with Python 3.11 and 3.12 takes a minute more to choose the versions
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "pip>=26"
# Python compiles a module when it is first imported: compiling all of them here would be half of the time
"$VENV/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check \
  -r requirements.txt ${EXTRAS:+"jax[$EXTRAS]"}
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
echo "$wanted" > "$VENV/.ready"
