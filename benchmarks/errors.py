"""The errors that a user can do something about: `gsto` prints their message in place of a traceback."""


class UsageError(ValueError):
    """The command line cannot be followed; the message says what is allowed."""


class DataError(UsageError):
    """The data cannot be used as asked.

    Args:
        lines: one for each problem; each names the file or folder, or the number, that is wrong. The message shows ten.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        shown, more = self.args[:10], len(self.args) - 10
        return "\n".join([*shown, f"... and {more} more: gsto verify lists them"] if more > 0 else shown)


class TrainingError(RuntimeError):
    """A run cannot start or go on; the message says what happened, what is left and what to change."""


class ExportError(RuntimeError):
    """An exported file computes something else than its network; the message says by how much, and that it is removed."""
