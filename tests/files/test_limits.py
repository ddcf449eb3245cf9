"""The limit of open files."""

import resource
import subprocess
import sys

import pytest

from mvar_jax.errors import InputError
from mvar_jax.files import limits

RAISE = """
import resource, sys
from mvar_jax.files.limits import allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 900))
allow_open_files(int(sys.argv[1]), "many shards")
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("num_files", "is_raised"), [(1, False), (500, True)])
def test_the_soft_limit_is_raised_to_what_is_needed(num_files, is_raised):
    found = subprocess.run([sys.executable, "-c", RAISE, str(num_files)], capture_output=True, text=True, check=True)
    soft, hard = (int(number) for number in found.stdout.strip("()\n").split(", "))
    assert hard == 900 and (756 < soft <= 900 if is_raised else soft == 300)


def test_a_hard_limit_that_is_too_low_is_said(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    with pytest.raises(
        InputError, match=r"2000 tars of DIR need a limit of \d+ open files, this process may have 1024"
    ):
        limits.allow_open_files(2000, "2000 tars of DIR")
