"""The errors that a user can do something about: `gsto` prints their message in place of a traceback."""


class UsageError(ValueError):
    """The command line cannot be followed; the message says what is allowed."""


class DataError(UsageError):
    """The data cannot be used as asked; the message names the file or folder, or the number, that is wrong."""


class TrainingError(RuntimeError):
    """A run cannot start or go on; the message says what happened, what is left and what to change."""
