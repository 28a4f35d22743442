"""Tables that a user's machine fills: JSON files in the user's cache, safe against concurrent writers and damage."""

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


@lru_cache(maxsize=64)
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


class Table:
    """One JSON file of values by key, ``$XDG_CACHE_HOME/gsto_ops/{name}`` (``~/.cache`` without the variable).

    A writer merges its entry into the file's present content under a lock and replaces the file in one step, so readers never see
    a part of it; where there are no locks the last writer of a key wins.

    Args:
        name: of the file. holds: what the values are, for warnings. is_value: whether a value read from the file is one.
    """

    def __init__(self, name: str, holds: str, is_value: Callable[[Any], bool]) -> None:
        self.name, self.holds, self.is_value = name, holds, is_value
        self._known: dict[Path, dict[str, Any]] = {}  # by file: this process's view of it

    @property
    def path(self) -> Path:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gsto_ops" / self.name

    @property
    def entries(self) -> dict[str, Any]:
        """The entries as this process knows them: the file's when it was first read, and its own."""
        path = self.path
        if path not in self._known:
            self._known[path] = self.read()
        return self._known[path]

    def forget(self) -> None:
        """Lets the file be read again."""
        self._known.clear()

    def read(self) -> dict[str, Any]:
        """The file's entries; none where it does not exist, and none with a warning where it is damaged."""
        try:
            content = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            warn_once(f"gsto_ops: {self.path} cannot be read and is ignored: {error}")
            return {}
        if not isinstance(content, dict) or not all(map(self.is_value, content.values())):
            warn_once(f"gsto_ops: {self.path} is damaged and is ignored: not a table of {self.holds}")
            return {}
        return content

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if fcntl is None:
            yield
            return
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def write(self, key: str, value: Any) -> None:
        """Adds an entry. A file that cannot be written costs a warning, not the call."""
        self.entries[key] = value
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                content = {**self.read(), key: value}
                with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
                    json.dump(content, file, indent=1, sort_keys=True)
                os.replace(file.name, self.path)
        except OSError as error:
            warn_once(f"gsto_ops: {self.path} cannot be written: {error}")
