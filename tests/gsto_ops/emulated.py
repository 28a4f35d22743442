"""Builds the CUDA sources for the emulator (csrc/cuda/emulator.h) and registers their operators as torch.ops.gsto_emulated."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gsto_ops.ops import batch_norm_sum, gated_split, update_running_statistics

CSRC = Path(__file__).parents[2] / "csrc"
RESAMPLING = "str mode, bool align_corners, float? scale_h, float? scale_w"
SCHEMAS = (
    "gated_scale_transfer(Tensor input, Tensor gate_weight, Tensor? gate_bias, Tensor? weight, Tensor? bias, str activation, "
    f"SymInt[2] size, {RESAMPLING}) -> (Tensor, Tensor)",
    "gated_scale_transfer_backward(Tensor grad_output, Tensor? grad_gate, Tensor input, Tensor gate, Tensor gate_weight, "
    f"Tensor? weight, Tensor? bias, str activation, {RESAMPLING}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gated_projection(Tensor input, Tensor gate_weight, Tensor? gate_bias, Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)",
    "gated_projection_backward(Tensor grad_output, Tensor? grad_gate, Tensor? grad_mean, Tensor? grad_var, Tensor input, "
    "Tensor gate, Tensor gate_weight, Tensor weight, Tensor output, Tensor mean) -> (Tensor, Tensor, Tensor, Tensor)",
    f"affine_scale_transfer(Tensor input, Tensor scale, Tensor shift, str activation, SymInt[2] size, {RESAMPLING}) -> Tensor",
    "affine_scale_transfer_backward(Tensor grad_output, Tensor input, Tensor scale, Tensor shift, str activation, "
    f"{RESAMPLING}) -> (Tensor, Tensor, Tensor)",
    "gated_pyramid_pool(Tensor input, Tensor gate_weight, Tensor? gate_bias, int[] bins) -> (Tensor, Tensor)",
    "gated_pyramid_pool_backward(Tensor grad_pooled, Tensor? grad_gate, Tensor input, Tensor gate, Tensor gate_weight, "
    "int[] bins) -> (Tensor, Tensor, Tensor)",
    "upsample_cross_entropy(Tensor input, Tensor target, Tensor? weight, int ignore_index, str reduction, bool align_corners) "
    "-> (Tensor, Tensor, Tensor)",
    "upsample_cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor? weight, Tensor logsumexp, "
    "Tensor mass, int ignore_index, str reduction, bool align_corners) -> Tensor",
    "channel_statistics(Tensor input) -> (Tensor mean, Tensor var)",
    f"gated_split{gated_split.SCHEMA}",
    f"gated_split_backward{gated_split.BACKWARD_SCHEMA}",
    f"batch_norm_sum{batch_norm_sum.SCHEMA}",
    f"batch_norm_sum_backward{batch_norm_sum.BACKWARD_SCHEMA}",
    f"batch_norm_sum_backward_terms{batch_norm_sum.BACKWARD_TERMS_SCHEMA}",
    f"update_running_statistics_{update_running_statistics.SCHEMA}",
    "set_allow_tf32(bool allow) -> ()",
)


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def build(folder: Path) -> Path:
    """The shared library, compiled into ``folder`` unless one of the same sources and torch is there."""
    sources = sorted([*CSRC.glob("cuda/*.cu"), *CSRC.glob("cuda/*.cpp")])
    sources.remove(CSRC / "cuda" / "module.cpp")  # the Python module of the CUDA build
    inputs = [*sources, *CSRC.glob("cuda/*.h"), *CSRC.glob("*.h")]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(inputs):
        digest.update(path.read_bytes())
    library = folder / f"gsto_emulated_{digest.hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of the tests' processes builds it, and the others wait
        if not library.exists():
            compile_into(library, sources)
    return library


def compile_into(library: Path, sources: list[Path]) -> None:
    """Compiles and links; the library appears whole or not at all."""
    torch_root = Path(torch.__file__).parent
    flags = [str(compiler()), "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DGSTO_EMULATE_CUDA"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{CSRC}", f"-I{torch_root / 'include'}"]

    def compile_one(source: Path) -> str:
        target = f"{scratch}/{source.name}.o"
        command = [*flags, "-x", "c++", "-c", str(source), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return target

    lib = str(torch_root / "lib")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
        linked = f"{scratch}/library.so"
        command = [flags[0], "-shared", *objects, f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-lc10", "-o", linked]
        subprocess.run(command, check=True)
        Path(linked).rename(library)


def load(folder: Path) -> object:
    """torch.ops.gsto_emulated, built if need be, once per process."""
    if hasattr(load, "library"):
        return torch.ops.gsto_emulated
    library = torch.library.Library("gsto_emulated", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    torch.ops.load_library(str(build(folder)))
    load.library = library  # type: ignore[attr-defined]  # the definitions live as long as it does
    return torch.ops.gsto_emulated
