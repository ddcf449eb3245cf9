"""An error of a file or its disk that reaches the end of a command is one sentence."""

import errno
import os

import pytest

from mvar_jax.processes.together import run_together


@pytest.mark.parametrize(
    ("number", "name", "status"),
    [
        (errno.ENOSPC, None, 1),
        (errno.EDQUOT, "out/a.png", 1),
        (errno.EIO, "s3://bucket/a", 1),
        (errno.ENAMETOOLONG, "x" * 300, 2),
        (errno.ENOENT, b"caf\xe9.png", 2),
        (errno.EACCES, "weights.pth", 2),
    ],
)
def test_file_error_is_one_sentence_with_the_file_and_the_reason(capsys, number, name, status):
    def program():
        raise OSError(number, os.strerror(number), name)

    assert run_together(program) == status
    shown = r"caf\udce9.png" if isinstance(name, bytes) else name
    words = f"{shown}: {os.strerror(number)}" if name else os.strerror(number)
    assert capsys.readouterr().err == f"error: {words}\n"


def test_other_errors_keep_their_traceback():
    def program():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        run_together(program)
