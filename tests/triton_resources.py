"""Compiles the Triton kernels ahead of time for sm_80 and sm_90, prints what each uses, and fails on spills or where a
multiprocessor has too little shared memory.

What is compiled is what the launchers launch for the calls of tests/triton_sweep.py:

- as it is      every tile that the plan can choose for bfloat16 and float32, in both layouts, and every pair of flags (mode,
                activation, gate form, 64-bit offsets, ...) with the largest tile that has it; for float16, whose tiles are those
                of bfloat16, and for float32 in TF32, whose are those of float32, the calls of --quick: hours
- ``--all``     every tile with every set of flags, for all dtypes: some 200,000 kernels, days
- ``--quick``   in CI, bfloat16 alone: two counts of channels, one size of maps, ReLU, doubling and halving. It leaves out
                float32, nearest, align_corners, 64-bit offsets, no activation, other pyramids and fusions, and most tiles

Needs triton, no GPU: python tests/triton_resources.py [--quick | --all] [--jobs N] [--results FILE] [architecture ...]
With ``--results`` every compiled kernel is a line in FILE, and a run that was stopped goes on from there.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from triton_sweep import ALL, DTYPES, QUICK, Domain, Launch, covering, launches

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes per program
# Bytes per thread that ptxas may spill: a few registers, which it gives up by itself where one more program then fits a
# multiprocessor. More is a tile that is too large.
SPILL_LIMIT = 32


@dataclass(frozen=True)
class Kernel:
    name: str  # with dtype and constants
    architecture: int
    registers: int
    shared: int
    stack: int

    @property
    def wrong(self) -> str:
        if self.stack > SPILL_LIMIT:
            return "  <- spills"
        return "  <- shared memory" if self.shared > SHARED_LIMIT[self.architecture] else ""


class OfflineDriver:
    """What Triton asks of a driver in order to compile, for a GPU that need not be here."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # what is compiled for one is kept for it, and not taken for another architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and so on of a kernel's machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", report.split("Function")[-1])}


def source_digest() -> str:
    """Of all that decides what a kernel is compiled to."""
    import triton

    import gsto_ops.triton

    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted(Path(gsto_ops.triton.__path__[0]).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def known_results(path: Path | None, digest: str) -> dict[tuple[int, str], Kernel]:
    """What an earlier run of the same sources has compiled; a last line that it could not finish is left out."""
    if path is None or not path.exists():
        return {}
    kernels = []
    for line in path.read_text().splitlines():
        if line.endswith("}") and (entry := json.loads(line)).pop("source") == digest:
            kernels.append(Kernel(**entry))
    return {(k.architecture, k.name): k for k in kernels}


@dataclass(frozen=True)
class Job:
    architecture: int
    dtype: torch.dtype
    domain: Domain
    tf32: bool = False
    all_combinations: bool = False


def compile_all(job: Job, results: Path | None) -> list[Kernel]:
    """Compiles what the operators would launch in the calls of one job."""
    import triton

    triton.runtime.driver.set_active(OfflineDriver(job.architecture))
    found = launches(job.architecture, job.dtype, job.domain, job.tf32)
    if not job.all_combinations:
        found = covering(found)
    digest = source_digest()
    known, kernels = known_results(results, digest), []
    for number, launch in enumerate(found):
        kernel = known.get((job.architecture, launch.key))
        if kernel is None:
            kernel = compiled(launch, job.architecture)
            if results is not None:
                with results.open("a") as file:
                    file.write(json.dumps({"source": digest, **asdict(kernel)}) + "\n")
        kernels.append(kernel)
        if number % 100 == 99:
            print(f"sm_{job.architecture} {job.dtype}: {number + 1} of {len(found)}", file=sys.stderr, flush=True)
    return kernels


def compiled(launch: Launch, architecture: int) -> Kernel:
    machine = launch.kernel.warmup(*launch.args, grid=(1,), **launch.constants)
    if machine.metadata.target.arch != architecture:
        raise RuntimeError(f"{launch.key}: compiled for sm_{machine.metadata.target.arch}, not sm_{architecture}")
    used = usage(machine.asm["cubin"])
    return Kernel(launch.key, architecture, used["REG"], machine.metadata.shared, used["STACK"] + used["LOCAL"])


def jobs_of(options: argparse.Namespace) -> list[Job]:
    jobs = []
    for architecture in options.architectures:
        if options.quick:
            jobs.append(Job(architecture, torch.bfloat16, QUICK))
            continue
        for dtype, tf32 in (*itertools.product(DTYPES, (False,)), (torch.float32, True)):
            same_tiles = dtype == torch.float16 or tf32
            domain = QUICK if same_tiles and not options.all else ALL
            jobs.append(Job(architecture, dtype, domain, tf32, options.all))
    return jobs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", type=int, default=[80, 90])
    parser.add_argument("--quick", action="store_true", help="a small part of the sweep")
    parser.add_argument("--all", action="store_true", help="every tile with every set of flags")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument(
        "--results", type=Path, help="where to keep results, and to find those of a run that was stopped"
    )
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    jobs = jobs_of(options)
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor(options.jobs) as pool:
        os.environ["TRITON_CACHE_DIR"] = cache  # of the processes, which start with the first job
        parts = pool.map(compile_all, jobs, itertools.repeat(options.results))
        kernels = sorted({(k.architecture, k.name): k for part in parts for k in part}.values(), key=lambda k: k.name)
    print(f"{'arch':>6}{'registers':>11}{'shared':>9}{'stack':>7}  kernel")
    for k in kernels:
        print(f"{k.architecture:>6}{k.registers:>11}{k.shared:>9}{k.stack:>7}  {k.name}{k.wrong}")
    wrong = [k for k in kernels if k.wrong]
    for k in wrong:
        print(f"sm_{k.architecture}: {k.registers} registers, {k.shared} shared, {k.stack} stack: {k.name}{k.wrong}")
    print(
        f"{len(kernels)} kernels, at most {max(k.registers for k in kernels)} registers and "
        f"{max(k.shared for k in kernels)} bytes of shared memory, {len(wrong)} with spills or too much shared memory"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
