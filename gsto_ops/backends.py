"""Which implementation runs a call, and why: ``available_backends``, ``use_backend``, ``report``.

Backends: ``cuda`` and ``cpu`` (the compiled CUDA and C++ kernels), ``triton`` (kernels that Triton compiles at the first
call), ``reference`` (plain PyTorch, any device). ``auto`` takes the first one that can run the call; where that is the
reference because of this machine or install, it says so once.
"""

import functools
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import (
    measured,
    ops,  # noqa: F401  (the operators must be defined before the extension adds kernels to them)
)

BACKENDS = measured.BACKENDS
DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
TRITON_PACKAGES = ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")
MIN_TRITON = (3, 4)
MIN_CAPABILITY = (8, 0)  # bf16 matrix instructions


def _load_extension(name: str, backend: str) -> tuple[ModuleType | None, str | None]:
    """(module, None), or (None, why it is not there). A built extension that does not load is a broken install: it warns."""
    try:
        return importlib.import_module(name), None
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        record = Path(__file__).with_name("_build.json")
        build = json.loads(record.read_text()) if record.exists() else {}
        return None, f"{name} is not built ({build.get(backend, 'no record of a build')})"
    except ImportError as error:
        reason = f"{name} does not load: {error}"
        warnings.warn(f"gsto_ops: {reason}. The reference runs instead; reinstall to mend this.", stacklevel=2)
        return None, reason


_extension, _no_extension = _load_extension("gsto_ops._C", "cpu")
_cuda_extension, _no_cuda_extension = (
    (None, f"torch {torch.__version__} is a build without CUDA")
    if torch.version.cuda is None
    else _load_extension("gsto_ops._CUDA", "cuda")
)


def _why_not_gpu(index: int | None) -> str | None:
    """The reason for which this GPU (None: the current one) cannot run the kernels, or None when it can."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is visible"
    if torch.cuda.get_device_capability(index) < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return f"{name} is older than compute capability {'.'.join(str(n) for n in MIN_CAPABILITY)}"
    return None


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo: the answer never changes.
_why_not_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _find_triton() -> str | None:
    """The reason for which the Triton kernels cannot run in this environment, or None when they can."""
    found = [d.version for name in TRITON_PACKAGES for d in importlib.metadata.distributions(name=name)]
    if not found:
        return "triton is not installed"
    version = re.match(r"(\d+)\.(\d+)", found[0])
    if version is None or tuple(map(int, version.groups())) < MIN_TRITON:
        return f"triton {found[0]} is older than {'.'.join(str(n) for n in MIN_TRITON)}"
    return None if _INTERPRETED else _why_no_launcher()


def _why_no_launcher() -> str | None:
    """Triton compiles the code that launches a kernel, in C; what it needs for that and does not find."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler: neither gcc nor clang is on PATH, and CC is not set"
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not Path(include, "Python.h").exists():
        return (
            f"triton needs Python's C headers: {include}/Python.h does not exist (a package such as python3-dev has it)"
        )
    return None


_no_triton = _find_triton()
DEVICES = {"cuda": "cuda", "triton": "cpu" if _INTERPRETED else "cuda", "cpu": "cpu"}


def why_not(backend: str, index: int | None = None) -> str | None:
    """The reason for which ``backend`` cannot run on this machine (on its GPU ``index``), or None when it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return _no_extension
    missing = _no_cuda_extension if backend == "cuda" else _no_triton
    if missing is not None or (backend == "triton" and _INTERPRETED):
        return missing
    return _why_not_gpu(index)


def why_not_call(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason for which ``backend`` cannot take a call on tensors of this device and dtype, or None when it can."""
    if backend == "reference":
        return None
    if device.type != DEVICES[backend]:
        return f"it takes tensors on {DEVICES[backend]!r}, not on {device.type!r}"
    if dtype not in DTYPES[backend]:
        return f"it takes {', '.join(str(d) for d in DTYPES[backend])}, not {dtype}"
    return why_not(backend, device.index)


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


# What ``select`` has found. The reasons why a backend cannot take a call do not change while a process lives.
_found: dict[tuple[str, torch.device, torch.dtype], str] = {}


def select(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for a call on tensors of this device and dtype. RuntimeError when the chosen one cannot take it.

    While ``torch.export`` traces, ``auto`` is the reference: the exported program consists of PyTorch's own operators. One
    that is chosen by name stays, as an operator that the program needs this package for.
    """
    if is_compiling():
        return "reference" if _selected == "auto" and torch.compiler.is_exporting() else _select(device, dtype)
    key = (_selected, device, dtype)
    found = _found.get(key)
    if found is None:
        found = _found[key] = _select(device, dtype)
        if found == "reference" and _selected == "auto" and (reasons := _reasons(device, dtype)):
            warnings.warn(
                f"gsto_ops: {device.type} tensors run on the plain PyTorch reference, which is slower than the kernels: "
                f"{'; '.join(reasons)}. GSTO_BACKEND=reference chooses it without this warning.",
                stacklevel=2,
            )
    return found


def select_for(operator: str, input: Tensor) -> str:
    """The backend of one call: :func:`select`'s, or in ``auto`` the one that was measured to be faster for such calls.

    Compiled code takes the former: a size must not decide what is compiled.
    """
    if not is_compiling():  # what a second call finds, in half of the time
        found = _found.get((_selected, input.device, input.dtype))
        if found is not None and (_selected != "auto" or not measured.choices()):
            return found
    backend = select(input.device, input.dtype)
    if _selected != "auto" or is_compiling() or not (choices := measured.choices()):
        return backend
    faster = choices.get(call_of(operator, input).key, backend)
    return backend if why_not_call(faster, input.device, input.dtype) else faster


def call_of(operator: str, input: Tensor) -> measured.Call:
    """What ``measured.remember`` files a call under: ``remember(call_of(operator, input), backend)``."""
    return measured.call_of(_architecture(input.device), operator, input)


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    kernels = "no kernels" if _extension is None else _extension.build_info()["instruction_set"]
    return f"{platform.machine()}-{kernels}".replace(" ", "-")


def _select(device: torch.device, dtype: torch.dtype) -> str:
    if _selected == "auto":
        # Triton's interpreter is for tests: it runs only where it is asked for by name.
        usable = (
            b for b in BACKENDS if why_not_call(b, device, dtype) is None and not (b == "triton" and _INTERPRETED)
        )
        return next(usable)
    if reason := why_not_call(_selected, device, dtype):
        raise RuntimeError(f"backend {_selected!r} was asked for but cannot take this call: {reason}")
    return _selected


def _reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the kernels that are made for this device and dtype do not run here."""
    made = [b for b in BACKENDS[:-1] if DEVICES[b] == device.type and dtype in DTYPES[b]]
    return [f"{b}: {why_not(b, device.index)}" for b in made if not (b == "triton" and _INTERPRETED)]


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
    if _cuda_extension is not None:
        lines.append("CUDA extension: loaded")
    lines.append(
        f"measured choices: {len(measured.SHIPPED)} shipped, {len(measured.TABLE.read())} in {measured.TABLE.path}"
    )
    lines.append(f"selected: {_selected} (GSTO_BACKEND or gsto_ops.use_backend)")
    if _selected == "auto":
        cpu, gpu = (_select(torch.device(device), torch.float32) for device in ("cpu", "cuda"))
        lines.append(f"CPU tensors run on: {cpu}; GPU tensors run on: {gpu}")
    return "\n".join(lines)
