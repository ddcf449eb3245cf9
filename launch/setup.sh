#!/usr/bin/env bash
# Create the environment of requirements.txt and this package beside the repository's files: .venv, or .venv-3.X with
# PYTHON=3.X. Does nothing if that is already done.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
choose_environment

wanted=$(cat requirements.txt pyproject.toml | cksum)
if [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/.ready" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi
echo "setting up $VENV with $("$PYTHON" --version) (about 2 GB; a minute or two)"
"$PYTHON" -m venv "$VENV"
# Python compiles a module when it is first imported: compiling all of them here would be half of the time
"$VENV/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -e .
echo "$wanted" > "$VENV/.ready"
