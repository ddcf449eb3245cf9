"""How `--distributed` is read."""

import pytest

from mvar_jax.errors import InputError
from mvar_jax.processes import join


def test_processes_are_those_of_the_option_or_of_the_environment():
    assert join.parse_distributed("a:1,2,1") == ("a:1", 2, 1)
    assert join.parse_distributed("auto") is None


@pytest.mark.parametrize("option", ["on", "a:1", "a,2,0", "a:1,2,2", "a:1,two,0"])
def test_processes_that_cannot_be_meant_are_refused(option):
    with pytest.raises(InputError, match="distributed must be .*HOST:PORT,NUM,INDEX.*, got") as caught:
        join.parse_distributed(option)
    assert caught.value.field == "distributed" and caught.value.given == option
