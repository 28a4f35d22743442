"""Which implementation runs a call, and why: ``available_backends``, ``use_backend``, ``report``.

Backends: ``cpu`` (the compiled C++ kernels), ``cuda`` and ``triton`` (not in this version), ``reference`` (plain PyTorch,
any device). ``auto`` takes the first one that can run the call.
"""

import importlib
import json
import os
import platform
import warnings
from pathlib import Path
from types import ModuleType

import torch

from . import registration  # noqa: F401  (the operators must be defined before the extension adds kernels to them)

BACKENDS = ("cuda", "triton", "cpu", "reference")
CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _load_extension() -> tuple[ModuleType | None, str | None]:
    """(module, None), or (None, why it is not there). A built extension that does not load is a broken install: it warns."""
    try:
        return importlib.import_module("gsto_ops._C"), None
    except ModuleNotFoundError as error:
        if error.name != "gsto_ops._C":
            raise
        record = Path(__file__).with_name("_build.json")
        build = json.loads(record.read_text()) if record.exists() else {}
        return None, f"the C++ extension is not built ({build.get('cpu', 'no record of a build')})"
    except ImportError as error:
        reason = f"the C++ extension does not load: {error}"
        warnings.warn(f"gsto_ops: {reason}. The reference runs instead; reinstall to mend this.", stacklevel=2)
        return None, reason


_extension, _no_extension = _load_extension()


def why_not(backend: str) -> str | None:
    """The reason for which ``backend`` cannot run on this machine, or None when it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return _no_extension
    return "this version has no kernels for it"


def available_backends() -> list[str]:
    """The backends that can run on this machine, in the order in which ``auto`` tries them."""
    return [backend for backend in BACKENDS if why_not(backend) is None]


def _checked(backend: str, source: str) -> str:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"{source} must be one of {('auto', *BACKENDS)}, got {backend!r}")
    if backend != "auto" and (reason := why_not(backend)):
        raise RuntimeError(f"{source}: backend {backend!r} cannot run here: {reason}")
    return backend


_selected = _checked(os.environ.get("GSTO_BACKEND", "auto"), "environment variable GSTO_BACKEND")


class use_backend:
    """Chooses the backend of all following calls in this process; as a context manager, of the calls inside it.

    Args:
        backend: ``"auto"`` (default behaviour), ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``. The environment
            variable ``GSTO_BACKEND`` sets the initial choice.

    Raises:
        ValueError: unknown name. RuntimeError: the backend cannot run on this machine (the message says why).
    """

    def __init__(self, backend: str) -> None:
        global _selected
        _checked(backend, "backend")
        self.previous, _selected = _selected, backend

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exception: object) -> None:
        global _selected
        _selected = self.previous


def select(device_type: str, dtype: torch.dtype) -> str:
    """The backend for a call on tensors of this device and dtype. RuntimeError when the one that was asked for cannot take it."""
    native = _extension is not None and device_type == "cpu" and dtype in CPU_DTYPES
    if _selected == "auto":
        return "cpu" if native else "reference"
    if _selected == "cpu" and not native:
        raise RuntimeError(
            f"backend 'cpu' was asked for, but the call has {dtype} tensors on {device_type!r}; it takes "
            f"{', '.join(str(d) for d in CPU_DTYPES)} on 'cpu'"
        )
    return _selected


def report() -> str:
    """What is built, what will run on this machine, and why: the text of ``python -m gsto_ops``."""
    lines = [
        f"gsto_ops on Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads",
        f"GPUs: {', '.join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or 'none'}",
        "backends, in the order in which 'auto' tries them:",
    ]
    for backend in BACKENDS:
        reason = why_not(backend)
        lines.append(f"  {backend:<10}{'runs' if reason is None else 'not here: ' + reason}")
    if _extension is not None:
        lines.append("C++ extension:")
        lines += [f"  {key}: {value}" for key, value in _extension.build_info().items()]
    lines.append(f"selected: {_selected} (GSTO_BACKEND or gsto_ops.use_backend)")
    cpu, gpu = ("reference" if why_not(b) else b for b in ("cpu", "cuda"))
    if _selected == "auto":
        lines.append(f"CPU tensors run on: {cpu}; GPU tensors run on: {gpu}")
    return "\n".join(lines)
