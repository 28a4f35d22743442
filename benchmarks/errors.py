"""The errors that a user can do something about: `gsto` prints their message in place of a traceback."""


class UsageError(ValueError):
    """The command line cannot be followed; the message says what is allowed."""


class TrainingError(RuntimeError):
    """A run cannot start or go on; the message says what happened, what is left and what to change."""
