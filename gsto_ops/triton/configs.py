"""Launch configurations: pure functions from a problem and a target, a small table per architecture, and :func:`run`.

The table holds, per kernel, the largest tile that compiles for the architecture without spills (tests/triton_resources.py
checks all that can be chosen) and its warps and stages; :func:`choose` fits it to the problem: no wider than the channels, and
smaller where a multiprocessor would stay without a program. With ``GSTO_AUTOTUNE=1`` the first call of a problem times a few
neighbours of that choice instead and remembers the fastest (see tuning.py).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch

from . import tuning

Result = TypeVar("Result")


class Problem(NamedTuple):
    """What a choice may depend on. height and width are those of the map whose pixels the programs share out."""

    kernel: str
    dtype: torch.dtype
    channels_last: bool
    channels: int
    out_channels: int
    images: int
    height: int
    width: int
    precision: str  # of float32 products: "ieee" or "tf32"
    tight: bool = False  # 64-bit offsets or many maps take registers that a full tile needs: half of one


class Target(NamedTuple):
    architecture: str  # "sm_90", "gfx942", "cpu" under the interpreter
    multiprocessors: int
    name: str


class Config(NamedTuple):
    """A tile of height x width pixels. ``channels`` is the block of the input's channels (of a product: the step of k, unless the
    kernel holds all of a pixel), ``out_channels`` that of the other ones: the output's, or the bins."""

    height: int
    width: int
    channels: int
    out_channels: int
    num_warps: int
    num_stages: int


class Limits(NamedTuple):
    """The largest tile of a kernel: pixels, elements (pixels x channels), channels, out_channels; warps and stages."""

    pixels: int
    elements: int
    channels: int
    out_channels: int
    num_warps: int
    num_stages: int


# (kernel, bytes per element). 16-byte accesses and 16 to 32 elements per thread for the gathers; for the products tiles of which
# at least two programs fit a multiprocessor's shared memory (164 KiB on sm_80, 228 KiB on sm_90).
_SM_80 = {
    ("project", 2): Limits(128, 16384, 64, 128, 8, 3),
    ("project", 4): Limits(64, 4096, 32, 64, 8, 2),
    ("weight_gradient", 2): Limits(64, 4096, 64, 64, 8, 3),
    ("weight_gradient", 4): Limits(32, 2048, 64, 64, 4, 2),
    ("resample", 2): Limits(128, 2048, 64, 1, 4, 1),
    ("resample", 4): Limits(128, 2048, 64, 1, 4, 1),
    ("resample_transposed", 2): Limits(128, 2048, 64, 1, 4, 1),
    ("resample_transposed", 4): Limits(128, 2048, 64, 1, 4, 1),
    ("gated_split", 2): Limits(128, 16384, 512, 32, 8, 2),
    ("gated_split", 4): Limits(64, 4096, 32, 32, 8, 2),
    ("gated_split_copies", 2): Limits(128, 8192, 512, 1, 8, 1),
    ("gated_split_copies", 4): Limits(128, 8192, 512, 1, 8, 1),
    ("gated_split_backward", 2): Limits(64, 8192, 256, 32, 8, 2),
    ("gated_split_backward", 4): Limits(64, 4096, 128, 16, 8, 2),
    ("gated_split_backward_copies", 2): Limits(128, 4096, 512, 1, 8, 1),
    ("gated_split_backward_copies", 4): Limits(128, 4096, 512, 1, 8, 1),
    ("channel_statistics", 2): Limits(256, 4096, 64, 1, 8, 1),
    ("channel_statistics", 4): Limits(256, 4096, 64, 1, 8, 1),
    ("batch_norm_sum", 2): Limits(256, 4096, 64, 1, 8, 1),
    ("batch_norm_sum", 4): Limits(256, 2048, 64, 1, 4, 1),
    ("batch_norm_sum_gather", 2): Limits(128, 2048, 64, 1, 8, 1),
    ("batch_norm_sum_gather", 4): Limits(128, 2048, 64, 1, 8, 1),
    ("batch_norm_sum_backward", 2): Limits(128, 2048, 64, 1, 8, 1),
    ("batch_norm_sum_backward", 4): Limits(128, 2048, 64, 1, 8, 1),
    ("batch_norm_sum_backward_terms", 2): Limits(256, 4096, 64, 1, 4, 1),
    ("batch_norm_sum_backward_terms", 4): Limits(256, 2048, 64, 1, 4, 1),
    ("gate_pool", 2): Limits(128, 4096, 512, 1, 4, 1),
    ("gate_pool", 4): Limits(128, 4096, 512, 1, 4, 1),
    ("gate_pool_project", 2): Limits(64, 4096, 512, 64, 4, 1),
    ("gate_pool_project", 4): Limits(64, 4096, 512, 16, 8, 1),
    ("gate_backward", 2): Limits(128, 8192, 512, 16, 8, 1),
    ("gate_backward", 4): Limits(128, 8192, 512, 16, 8, 1),
    ("project_backward", 2): Limits(64, 8192, 256, 32, 8, 2),
    ("project_backward", 4): Limits(64, 4096, 128, 16, 8, 2),
    ("pool", 2): Limits(64, 8192, 128, 64, 8, 3),
    ("pool", 4): Limits(32, 2048, 64, 64, 8, 3),
    ("pyramid_logits", 2): Limits(64, 4096, 64, 64, 8, 3),
    ("pyramid_logits", 4): Limits(32, 1024, 32, 64, 8, 2),
    ("pyramid_grad_input", 2): Limits(64, 4096, 64, 64, 8, 3),
    ("pyramid_grad_input", 4): Limits(32, 1024, 32, 64, 8, 2),
}
_SM_90 = {
    **_SM_80,
    ("weight_gradient", 2): Limits(64, 4096, 64, 64, 8, 4),
    ("project_backward", 2): Limits(64, 8192, 256, 32, 8, 3),
}
TABLE = {"sm_80": _SM_80, "sm_90": _SM_90}
WAVES = 4  # programs per multiprocessor below which tiles shrink
MAX_SUMS = 64 << 20  # bytes of partial sums

# Kernels whose tile holds all channels of a pixel up to the limit, so that its pixels follow from the channels.
_WHOLE_PIXELS = (
    "gate_pool",
    "gate_pool_project",
    "gate_backward",
    "project_backward",
    "gated_split",
    "gated_split_copies",
    "gated_split_backward",
    "gated_split_backward_copies",
)
_PRODUCTS = (
    "project",
    "weight_gradient",
    "gate_pool_project",
    "project_backward",
    "pool",
    "pyramid_logits",
    "pyramid_grad_input",
    "gated_split",
    "gated_split_backward",
)
# Over ranges of pixels, see splits() and resident_splits().
_SPLIT = ("weight_gradient", "pool", "channel_statistics", "batch_norm_sum_backward")
_ONE_ROW = (
    "project",
    "project_backward",
    "weight_gradient",
    "pool",
    "pyramid_logits",
    "pyramid_grad_input",
    "gated_split",
    "gated_split_copies",
    "gated_split_backward",
    "gated_split_backward_copies",
    "channel_statistics",
    "batch_norm_sum_backward",
    "batch_norm_sum_backward_terms",
)


def power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _least_pixels(kernel: str) -> int:
    if kernel in ("gated_split", "gated_split_backward"):
        return 32  # every tile reads all of W from L2: 258 KB at 384 channels, as much as 340 of its pixels
    return 16 if kernel in _PRODUCTS else 4


def programs(problem: Problem, config: Config) -> int:
    """How many programs a launch has; for split kernels without the splits."""
    pixels = problem.height * problem.width
    rows, cols = -(-problem.height // config.height), -(-problem.width // config.width)
    tiles = problem.images * rows * cols
    blocks_c = -(-problem.channels // config.channels)
    blocks_o = -(-problem.out_channels // config.out_channels)
    if problem.kernel == "project":
        return tiles * blocks_o
    if problem.kernel.startswith(("resample", "batch_norm_sum")):
        return tiles * blocks_c
    if problem.kernel == "weight_gradient":
        return blocks_c * blocks_o
    if problem.kernel == "pool":
        return problem.images * blocks_c * blocks_o
    if problem.kernel.startswith("pyramid"):
        tiles = problem.images * -(-pixels // config.width)
        return tiles * (blocks_c if problem.kernel == "pyramid_grad_input" else 1)
    return tiles


def _shape(problem: Problem, pixels: int) -> tuple[int, int]:
    """height x width of a tile of pixels: square for channels_last, where neighbours share taps; long rows for NCHW."""
    if problem.kernel in _ONE_ROW or problem.height == 1:
        return 1, pixels
    least = 8 if problem.channels_last else 64
    width = min(pixels, least, power_of_2(problem.width))
    height = min(pixels // width, power_of_2(problem.height))
    return height, min(pixels // height, power_of_2(problem.width))


def _fitted(problem: Problem, limits: Limits, pixels: int) -> Config:
    least = 16 if problem.kernel in _PRODUCTS else 1
    channels = min(max(power_of_2(problem.channels), least), limits.channels)
    if problem.kernel in _WHOLE_PIXELS and channels < problem.channels:
        channels = min(channels, 128)  # blocks of channels, each computed twice
    out_channels = min(max(power_of_2(problem.out_channels), least), limits.out_channels)
    block = out_channels if problem.kernel == "project" else channels
    elements = limits.elements // 2 if problem.tight else limits.elements
    pixels = max(_least_pixels(problem.kernel), min(pixels, limits.pixels, elements // block))
    height, width = _shape(problem, pixels)
    warps = limits.num_warps
    if not problem.kernel.startswith(("pool", "pyramid")):  # whose tiles of pixels and bins keep their size
        # At least 8 elements per thread: a 16-byte access, or its share of a matrix instruction.
        warps = min(warps, max(1, height * width * block // 256))
    if (
        height * width * block > limits.elements
    ):  # the least pixels of 512 channels: more than these warps have registers for
        warps = min(8, 2 * warps)
    return Config(height, width, channels, out_channels, warps, limits.num_stages)


@lru_cache(maxsize=4096)
def choose(problem: Problem, target: Target) -> Config:
    """The shipped choice: the architecture's table (else that of sm_80, the smallest) fitted to the problem."""
    limits = TABLE.get(target.architecture, _SM_80)[problem.kernel, problem.dtype.itemsize]
    config = _fitted(problem, limits, limits.pixels)
    if problem.kernel in _SPLIT:
        return config
    pixels = config.height * config.width
    while pixels > _least_pixels(problem.kernel) and programs(problem, config) < WAVES * target.multiprocessors:
        pixels //= 2
        config = _fitted(problem, limits, pixels)
    return config


def candidates(problem: Problem, target: Target) -> list[Config]:
    """The shipped choice first, then its neighbours: what autotuning times."""
    first = choose(problem, target)
    limits = TABLE.get(target.architecture, _SM_80)[problem.kernel, problem.dtype.itemsize]
    found = [first]
    pixels = first.height * first.width
    for size in (pixels * 2, pixels // 2):
        if _least_pixels(problem.kernel) <= size <= 2 * limits.pixels:
            wider = limits._replace(pixels=max(size, limits.pixels), elements=max(limits.elements, 2 * limits.elements))
            found.append(_fitted(problem, wider, size))
    for warps in (first.num_warps * 2, first.num_warps // 2):
        if 1 <= warps <= 8:
            found.append(first._replace(num_warps=warps))
    if problem.kernel in _PRODUCTS:
        found += [first._replace(num_stages=s) for s in (first.num_stages - 1, first.num_stages + 1) if s >= 1]
    return list(dict.fromkeys(found))


def splits(target: Target, blocks: int, tiles: int, tile_pixels: int, row: int) -> int:
    """Ranges of pixels over which a sum of ``row`` floats is split: enough programs, at least 256 pixels each."""
    wanted = -(-2 * WAVES * target.multiprocessors // max(1, blocks))
    most = max(1, tiles * tile_pixels // 256)
    return max(1, min(wanted, most, max(1, tiles), max(1, MAX_SUMS // (4 * max(1, row)))))


def resident_splits(target: Target, blocks: int, tiles: int) -> int:
    """Ranges of tiles over which sums per channel are split: as many programs as a GPU holds at once."""
    return max(1, min(tiles, -(-WAVES * target.multiprocessors // max(1, blocks))))


def target_of(device: torch.device) -> Target:
    """The device as configurations see it."""
    if device.type != "cuda":
        return Target("cpu", 1, "interpreter")
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    architecture = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        architecture = properties.gcnArchName.split(":")[0]
    return Target(architecture, properties.multi_processor_count, properties.name)


def run(problem: Problem, device: torch.device, body: Callable[[Config], Result]) -> Result:
    """``body`` with the configuration of this problem. It only writes what it is called to make: timing may repeat it."""
    target = target_of(device)
    config = choose(problem, target)
    if tuning.enabled() and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        config = Config(*tuning.fastest(tuning_key(problem, target), candidates(problem, target), body))
    return body(config)


def tuning_key(problem: Problem, target: Target) -> str:
    """A problem as autotuning files it: sizes of maps in powers of two."""
    sizes = (power_of_2(max(1, problem.images)), power_of_2(problem.height), power_of_2(problem.width))
    fields = (
        target.name,
        target.architecture,
        problem.kernel,
        str(problem.dtype).removeprefix("torch."),
        problem.precision + (" tight" if problem.tight else ""),
        "channels_last" if problem.channels_last else "contiguous",
        f"{problem.channels}-{problem.out_channels}",
        "x".join(str(n) for n in sizes),
    )
    return " ".join(fields)
