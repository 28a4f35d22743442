"""The configurations that `-c NAME` finds, and what they build on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .errors import UsageError


def shipped_configs() -> dict[str, Path]:
    """The configurations that `-c NAME` finds: name -> YAML file."""
    files = Path(__file__).parent.glob("*/configs/*.yaml")
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def resolve_config_names(argv: Sequence[str]) -> list[str]:
    """Replace shipped names behind `-c` or `--config` by their files, and put the files that these build on before them.

    A configuration builds on another one by a line `# base: FILE` (relative to its own folder); its own settings count.

    Raises:
        UsageError: neither a shipped name nor a file; a file that is no YAML mapping.
    """
    resolved, after_flag = [], False
    for word in argv:
        flag, equals, value = word.partition("=")
        if after_flag:
            resolved += _config_options(word)
        elif equals and flag in ("-c", "--config"):
            resolved += _config_options(value)
        elif word not in ("-c", "--config"):
            resolved.append(word)
        after_flag = not after_flag and word in ("-c", "--config")
    return [*resolved, "--config"] if after_flag else resolved  # a name is missing: the parser says so


def _config_options(name: str) -> list[str]:
    shipped = shipped_configs()
    if name not in shipped and not Path(name).is_file():
        raise UsageError(f"-c {name}: neither a file nor a shipped configuration (shipped: {', '.join(shipped)})")
    return [word for file in _with_bases(shipped.get(name, Path(name))) for word in ("--config", str(file))]


def _with_bases(file: Path) -> list[Path]:
    import yaml  # it comes with the trainers, and the help works without them

    try:
        text = file.read_text(encoding="utf-8")
        contents = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"-c {file}: not a YAML file: {error}") from error
    if not isinstance(contents, dict):
        raise UsageError(f"-c {file}: must be a YAML file of settings (key: value), got {type(contents).__name__}")
    bases = [file.parent / name for name in re.findall(r"^# base: (\S+)$", text, re.M)]
    for base in bases:
        if not base.is_file():
            raise UsageError(f"{file}: its base {base} does not exist")
    return [*(ancestor for base in bases for ancestor in _with_bases(base)), file]
