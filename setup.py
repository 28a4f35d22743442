"""Builds the native parts of gsto_ops; everything else about the package is declared in pyproject.toml.

``GSTO_BUILD_NATIVE``: ``auto`` (default) builds the C++ operators when torch, pybind11 and a compiler are there, and the CUDA
operators when torch is a CUDA build and a toolkit of its major version is there, and says what it skipped and why; ``1`` makes
a missing C++ prerequisite an error, ``cuda`` a missing CUDA one too; ``0`` installs pure Python. A compilation that fails is
always an error. ``TORCH_CUDA_ARCH_LIST`` chooses the GPU architectures (default 8.0;9.0+PTX).
"""

import json
import os
import re
import shutil
import subprocess
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


def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, or where nvcc is, or /usr/local/cuda; only if its headers are there."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    return next((Path(c) for c in candidates if c and (Path(c) / "include" / "cuda_runtime.h").exists()), None)


def why_not_cuda() -> str | None:
    """The reason for which the CUDA operators cannot be built here, or None when they can. No GPU is needed."""
    if reason := why_not_native():
        return reason
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    home = cuda_home()
    if home is None:
        return "no CUDA toolkit: set CUDA_HOME"
    printed = subprocess.run(
        [str(home / "bin" / "nvcc"), "--version"], capture_output=True, text=True, check=True
    ).stdout
    toolkit = re.search(r"release (\d+\.\d+)", printed)
    if toolkit is None or toolkit[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        found = toolkit and toolkit[1]
        return f"the CUDA toolkit in {home} is {found}, and torch {torch.__version__} is built for {torch.version.cuda}"
    return None


def extension(name: str, sources: list[Path], *, cuda: bool = False) -> Extension:
    """One module on torch's stable ABI. torch_python is not linked: it would tie the binary to one release."""
    import pybind11
    from torch.utils.cpp_extension import include_paths, library_paths

    optimise = ["-O3", "-std=c++17"]
    headers = include_paths(device_type="cuda") if cuda else include_paths()
    # -isystem: torch's headers are not ours to warn about. The kernels need none of them.
    host = [*optimise, "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    arguments = {"cxx": [*host, *(f"-isystem{path}" for path in headers)]}
    if cuda:
        arguments["nvcc"] = [
            *optimise,
            "-Werror",
            "all-warnings",
            "-Xcompiler",
            "-fvisibility=hidden",
            "--threads",
            "2",
        ]
    return Extension(
        name,
        sorted(str(path.relative_to(ROOT)) for path in sources),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        depends=[str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), *([("USE_CUDA", None)] if cuda else [])],
        libraries=["c10", "torch_cpu", *(["c10_cuda", "torch_cuda", "cudart"] if cuda else [])],
        library_dirs=library_paths(device_type="cuda") if cuda else library_paths(),
        extra_compile_args=arguments,
        language="c++",
    )


def extensions(build_cpu: bool, build_cuda: bool) -> list[Extension]:
    found = []
    if build_cpu:
        found.append(extension("gsto_ops._C", [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]))
    if build_cuda:
        # A module of its own: it needs torch's CUDA libraries, and gsto_ops._C has to load without them.
        sources = [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cpp")]
        found.append(extension("gsto_ops._CUDA", [p for p in sources if p.name != "emulator.cpp"], cuda=True))
    return found


def main() -> None:
    mode = os.environ.get("GSTO_BUILD_NATIVE", "auto")
    if mode not in ("auto", "0", "1", "cuda"):
        sys.exit(f"GSTO_BUILD_NATIVE must be auto, 0, 1 or cuda, got {mode!r}")
    if home := cuda_home():
        os.environ["CUDA_HOME"] = str(
            home
        )  # torch.utils.cpp_extension looks for nvcc only and can be misled by a wrapper
    no_cpu, no_cuda = why_not_native(), why_not_cuda()
    if mode in ("1", "cuda") and no_cpu:
        sys.exit(f"GSTO_BUILD_NATIVE={mode} but the C++ operators cannot be built: {no_cpu}")
    if mode == "cuda" and no_cuda:
        sys.exit(f"GSTO_BUILD_NATIVE=cuda but the CUDA operators cannot be built: {no_cuda}")

    record = {"cpu": f"skipped: {no_cpu}" if no_cpu else "built", "cuda": f"skipped: {no_cuda}" if no_cuda else "built"}
    commands = {}
    if not no_cpu:
        import torch
        from torch.utils.cpp_extension import BuildExtension

        record["torch"] = torch.__version__

        class BuildExtensions(BuildExtension):
            """Names objects by the whole name of the source: an operator's .cu and .cpp have the same one otherwise."""

            def build_extensions(self):
                usual = self.compiler.object_filenames

                def object_filenames(sources, *args, **kwargs):
                    objects = map(Path, usual(sources, *args, **kwargs))
                    return [str(o.with_name(Path(s).name + o.suffix)) for s, o in zip(sources, objects, strict=True)]

                self.compiler.object_filenames = object_filenames
                super().build_extensions()

        commands["build_ext"] = BuildExtensions
    if not no_cuda:
        # sm_80 and sm_90 machine code, and PTX that the driver compiles for anything newer.
        record["cuda architectures"] = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")

    class BuildPy(build_py):
        """Leaves the record of this build inside the package, where ``python -m gsto_ops`` reads it."""

        def run(self):
            super().run()
            folder = ROOT if self.editable_mode else Path(self.build_lib)
            (folder / "gsto_ops" / "_build.json").write_text(json.dumps(record, indent=1) + "\n")
            for part, state in record.items():
                print(f"gsto_ops build: {part}: {state}", file=sys.stderr)

    setup(ext_modules=extensions(not no_cpu, not no_cuda), cmdclass={"build_py": BuildPy, **commands})


main()
