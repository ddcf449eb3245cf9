"""The one exception a user's mistake raises: the command line turns it into one line and exit status 2."""


class InputError(ValueError):
    """Names the field, what was given and what would be right, in one line."""

    def __init__(self, field: str, given: object, expected: str):
        self.field, self.given, self.expected = field, given, expected
        super().__init__(f"{field}={given!r}: expected {expected}")

    def __reduce__(self):
        return InputError, (self.field, self.given, self.expected)  # as it crosses from a worker process


def shorten(error: Exception) -> str:
    """Its message on one line of bounded length."""
    text = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    return text if len(text) <= 200 else text[:197] + "..."
