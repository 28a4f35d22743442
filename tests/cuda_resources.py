"""Compiles every CUDA source for sm_80 and sm_90, prints what each kernel uses, and fails on spills and stack frames.

Needs nvcc (CUDA_HOME, or on the PATH), no GPU: python tests/cuda_resources.py [architecture ...]
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"
FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def compile_source(nvcc: str, source: Path, architectures: list[str], folder: str) -> str:
    """ptxas's report. Machine code for every architecture, and PTX for the last one."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    targets.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    command = [nvcc, *FLAGS, *targets, f"-I{CSRC}", "-c", str(source), "-o", f"{folder}/{source.stem}.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    # A spill is an error too, but this script's table names all of them; anything else is told in the compiler's words.
    errors = [line for line in report.splitlines() if "error" in line]
    others = [line for line in errors if "spill" not in line and "local memory" not in line.lower()]
    if done.returncode and (others or "Compiling entry function" not in report):
        sys.exit(f"{' '.join(command)}\n{report}")
    return report


def readable(symbols: list[str]) -> dict[str, str]:
    """Kernel names without namespaces, parameters and the enumeration's spelling."""
    if not shutil.which("c++filt"):
        return {symbol: symbol for symbol in symbols}
    plain = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = {}
    for symbol, name in zip(symbols, plain, strict=True):
        name = re.sub(r"^void |\(anonymous namespace\)::|gsto::cuda::|_GLOBAL__N__\w+::", "", name)
        name = re.sub(r"\(Float32Product\)0", "exact", re.sub(r"\(Float32Product\)1", "tf32", name))
        names[symbol] = re.sub(r"\(bool\)", "", name.rsplit("(", 1)[0])
    return names


def kernels_of(report: str) -> list[dict]:
    found: list[dict] = []
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(sm_\d+)'", line):
            found.append({"symbol": match[1], "architecture": match[2], "stack": 0, "spill": 0, "registers": 0})
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[-1]["stack"], found[-1]["spill"] = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            found[-1]["registers"] = int(match[1])
    return found


def main() -> int:
    architectures = sys.argv[1:] or ["80", "90"]
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda_resources: nvcc was not found (set CUDA_HOME)", file=sys.stderr)
        return 2
    sources = sorted(CSRC.glob("cuda/*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(lambda source: compile_source(nvcc, source, architectures, folder), sources)
        kernels = [kernel for report in reports for kernel in kernels_of(report)]
    names = readable([kernel["symbol"] for kernel in kernels])
    bad = 0
    print(f"{'kernel':<56}{'arch':>7}{'registers':>11}{'blocks/SM':>11}{'stack':>7}{'spill':>7}")
    for k in kernels:
        wrong = k["stack"] > 0 or k["spill"] > 0
        bad += wrong
        allocated = -(-k["registers"] // 8) * 8  # per thread, in units of 8; 128 threads per block, 65,536 registers
        blocks = 65536 // (128 * allocated)
        print(
            f"{names[k['symbol']]:<56}{k['architecture']:>7}{k['registers']:>11}{blocks:>11}{k['stack']:>7}{k['spill']:>7}"
            + ("  <- spills or stack" if wrong else "")
        )
    print(f"{len(kernels)} kernels, {bad} with spills or a stack frame")
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
