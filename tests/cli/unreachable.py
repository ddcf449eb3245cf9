"""Run commands without the package of gs://: JSON of arguments in, JSON of exit status and standard error out."""

import contextlib
import io
import json
import sys

sys.modules["gcsfs"] = None

from mvar_jax.__main__ import main  # noqa: E402

results = []
for line in json.load(sys.stdin):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(line)
        except Exception as error:
            status = repr(error)
    results.append([status, errors.getvalue()])
json.dump(results, sys.stdout)
