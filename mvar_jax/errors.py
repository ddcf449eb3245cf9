"""The exceptions that end a command with one line, and errors in one line."""

import errno
import os


class InputError(ValueError):
    """A mistake in what a user gave: the command line prints the message as one line and exits with status 2.

    The message is one whole sentence: field, value, what is allowed and, if there is one, the next step.

    Attributes:
      field: name of the argument, option or config key that is wrong.
      given: its value.
      expected: what is allowed.
    """

    def __init__(self, message: str, *, field: str, given: object = None, expected: str | None = None):
        self.field, self.given, self.expected = field, given, expected
        super().__init__(message)

    def __reduce__(self):
        # as it crosses from a worker process
        return _rebuild, (str(self), self.field, self.given, self.expected)


def _rebuild(message: str, field: str, given: object, expected: str | None) -> InputError:
    return InputError(message, field=field, given=given, expected=expected)


# a full or lost disk: nothing is wrong with the program, so a traceback would only hide the reason
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV)


# what a user named is not there, or not what it should be
_INPUT_ERRORS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM),
)


def is_input_error(error: OSError) -> bool:
    """Return whether an error of a file is one of its name or permissions."""
    return error.errno in _INPUT_ERRORS


def is_file_error(error: OSError) -> bool:
    """Return whether an error is about a file or its disk, so that its reason says more than a traceback."""
    return error.errno in STORAGE_ERRORS or bool(error.filename)


def find_storage_error(error: BaseException, path: str | os.PathLike) -> OSError | None:
    """Return the OSError of `path` that a library's exception tells of in its message, None if it is of no disk."""
    number = next((number for number in STORAGE_ERRORS if os.strerror(number) in str(error)), None)
    return None if number is None else OSError(number, os.strerror(number), str(path))


def describe_file_error(error: OSError) -> str:
    """Return the file, if it is known, and the reason, such as "out/grid.png: No space left on device"."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""
    name = name.encode(errors="backslashreplace").decode()  # of a file whose name is not UTF-8
    return f"{name}: {shorten(error)}" if name else shorten(error)


class RunError(RuntimeError):
    """A run that cannot continue, in one line: the command line exits with status 1."""


def shorten(error: Exception) -> str:
    """Return an exception's message as one line of at most 200 characters."""
    text = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    return text if len(text) <= 200 else text[:197] + "..."


def show(value: object) -> str:
    """Return a value for a message, on one line of at most 60 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
