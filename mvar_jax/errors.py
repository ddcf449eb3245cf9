"""The one exception a user's mistake raises: the command line turns it into one line and exit status 2."""


class InputError(ValueError):
    """Names the field, what was given and what would be right, in one line."""

    def __init__(self, field: str, given: object, expected: str):
        self.field, self.given, self.expected = field, given, expected
        super().__init__(f"{field}={given!r}: expected {expected}")

    def __reduce__(self):
        return InputError, (self.field, self.given, self.expected)  # as it crosses from a worker process
