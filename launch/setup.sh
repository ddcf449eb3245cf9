#!/usr/bin/env bash
# Makes .venv beside this repository with requirements.txt in it. Does nothing when that is done already.
set -euo pipefail
cd "$(dirname "$0")/.."

find_python() {
  for name in "${PYTHON:-}" python3.12 python3.11 python3; do
    if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: python3: expected Python 3.11 or 3.12 on the PATH (or PYTHON=/path/to/python)" >&2
  exit 2
}

wanted=$(cat requirements.txt pyproject.toml | cksum)
if [ -x .venv/bin/python ] && [ "$(cat .venv/.ready 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi
python=$(find_python)
echo "setting up .venv with $("$python" --version) (about 2 GB; a minute or two)"
"$python" -m venv .venv
# Python compiles what is imported when it first is: all of it here would be half of the time
.venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
echo "$wanted" > .venv/.ready
