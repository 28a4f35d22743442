"""The error of a command that cannot be followed."""


class UsageError(ValueError):
    """The command line cannot be followed; the message says what is allowed."""
