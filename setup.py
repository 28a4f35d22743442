"""Builds the native part of gsto_ops; everything else about the package is declared in pyproject.toml.

``GSTO_BUILD_NATIVE``: ``auto`` (default) builds the C++ operators when torch, pybind11 and a compiler are there, and says
what it skipped and why; ``1`` makes a missing prerequisite an error; ``0`` installs pure Python. A compilation that fails
is always an error.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MIN_TORCH = (2, 11)
# The stable ABI of this release is all that the sources use, so the binary serves it and every later release.
TORCH_TARGET_VERSION = f"0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"


def why_not_native() -> str | None:
    """The reason for which the C++ operators cannot be built here, or None when they can."""
    if os.environ.get("GSTO_BUILD_NATIVE") == "0":
        return "GSTO_BUILD_NATIVE=0"
    try:
        import pybind11  # noqa: F401
        import torch
        import torch.utils.cpp_extension
    except ImportError as error:
        return f"{error.name} is not installed in the build environment"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        return f"torch {torch.__version__} is older than {MIN_TORCH[0]}.{MIN_TORCH[1]}, the first with the stable ABI used here"
    compiler = os.environ.get("CXX", "cl" if os.name == "nt" else "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} is not on the PATH (set CXX)"
    return None


def native_extension() -> Extension:
    import pybind11
    from torch.utils.cpp_extension import include_paths, library_paths

    sources = [path for pattern in ("*.cpp", "cpu/*.cpp") for path in ROOT.glob(f"csrc/{pattern}")]
    headers = [str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")]
    return Extension(
        "gsto_ops._C",
        sorted(str(path.relative_to(ROOT)) for path in sources),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        depends=headers,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        # The stable ABI lives in these two; torch_python would tie the binary to one Python-side ABI.
        libraries=["c10", "torch_cpu"],
        library_dirs=library_paths(),
        extra_compile_args=[
            "-O3",
            "-g0",
            "-std=c++17",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-unknown-pragmas",
        ]
        + [f"-isystem{path}" for path in include_paths()],  # torch's headers are not ours to warn about
        language="c++",
    )


def main() -> None:
    mode = os.environ.get("GSTO_BUILD_NATIVE", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"GSTO_BUILD_NATIVE must be auto, 0 or 1, got {mode!r}")
    reason = why_not_native()
    if mode == "1" and reason:
        sys.exit(f"GSTO_BUILD_NATIVE=1 but the C++ operators cannot be built: {reason}")

    record = {"cpu": f"skipped: {reason}" if reason else "built", "cuda": "skipped: this version has no CUDA sources"}
    commands = {}
    if not reason:
        import torch
        from torch.utils.cpp_extension import BuildExtension

        record["torch"] = torch.__version__
        commands["build_ext"] = BuildExtension

    class BuildPy(build_py):
        """Leaves the record of this build inside the package, where ``python -m gsto_ops`` reads it."""

        def run(self):
            super().run()
            folder = ROOT if self.editable_mode else Path(self.build_lib)
            (folder / "gsto_ops" / "_build.json").write_text(json.dumps(record, indent=1) + "\n")
            for part, state in record.items():
                print(f"gsto_ops build: {part}: {state}", file=sys.stderr)

    setup(ext_modules=[] if reason else [native_extension()], cmdclass={"build_py": BuildPy, **commands})


main()
