"""``gsto bench traffic``: the bytes that a training step reads and writes, part by part, counted from shapes.

Every operator that runs counts its operands as read once and its results as written once; nothing is computed, so that any
network at any size takes seconds. Real traffic is lower where a map is still in cache, and higher inside operators that go over
memory more than once (convolutions with workspaces, reductions in two phases).
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

import gsto_models
import gsto_ops

from .options import at_least, parse_size

H200_BYTES_PER_SECOND = 4.249e12  # copy bandwidth, reads and writes counted
PARTS = ("stem, stage 1", "branches", "fusion", "transitions", "head", "loss")


@dataclass(frozen=True)
class Variant:
    """One column of the table: a network and how it and its loss run."""

    label: str
    network: str
    fused: bool

    def build(self, trunk: str) -> nn.Module:
        return gsto_models.create_model(f"{self.network}_{trunk}", fused=self.fused)

    def loss(self, outputs: Sequence[Tensor], labels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The sum of the heads' losses: fused, or upsampled first."""
        total = torch.zeros((), device=labels.device)
        for logits in outputs:
            if self.fused:
                total = total + gsto_ops.upsample_cross_entropy(logits, labels)
            else:
                upsampled = F.interpolate(logits.to(dtype), size=labels.shape[1:], mode="bilinear")
                total = total + F.cross_entropy(upsampled, labels)
        return total


VARIANTS = (
    Variant("HRNetV2, plain", "hrnetv2", False),
    Variant("GSTO-HRNet, plain", "gsto_hrnet", False),
    Variant("GSTO-HRNet, fused", "gsto_hrnet", True),
)


class Traffic(TorchDispatchMode):
    """Counts bytes, and operators that move any, by part and direction ("forward" or "backward") while it is active.

    ``part_of`` maps the names of the modules that run to a part. An operator of the backward pass belongs to the part in whose
    forward pass its autograd node was made: nodes are numbered.
    """

    def __init__(self, part_of: Callable[[Iterable[str]], str]) -> None:
        super().__init__()
        self.part_of = part_of
        self.tracker = ModuleTracker()
        self.bytes: dict[tuple[str, str], int] = defaultdict(int)
        self.calls: dict[tuple[str, str], int] = defaultdict(int)  # of operators that move any
        self.part_of_node: dict[int, str] = {}

    def __enter__(self) -> Traffic:
        self.tracker.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.tracker.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        node = torch._C._current_autograd_node()
        if node is None:
            part, direction = self.part_of(self.tracker.parents), "forward"
            self.part_of_node[torch.autograd._get_sequence_nr() - 1] = part
        else:
            part, direction = self.part_of_node.get(node._sequence_nr(), "loss"), "backward"
        output = func(*args, **(kwargs or {}))
        moved = moved_bytes(func, (args, kwargs or {}), output)
        self.bytes[part, direction] += moved
        self.calls[part, direction] += moved > 0
        return output


def moved_bytes(func: Any, inputs: Any, output: Any) -> int:
    """Operands read once (by PyTorch's batch norms twice) and results written once; nothing for views and fresh memory."""
    operands = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    name = func._schema.name
    if "empty" in name:
        return 0
    storages = {StorageWeakRef(tensor.untyped_storage()) for tensor in operands}
    fresh = [tensor for tensor in results if StorageWeakRef(tensor.untyped_storage()) not in storages]
    mutated = [
        leaf
        for argument, value in zip(func._schema.arguments, inputs[0], strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor)
    ]
    if not fresh and not mutated:
        return 0  # a view
    passes = 2 if "batch_norm" in name and name.startswith("aten::") else 1
    distinct = {(StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.shape): t for t in operands}
    return passes * sum(map(occupied_bytes, distinct.values())) + sum(map(occupied_bytes, [*fresh, *mutated]))


def occupied_bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's elements; expanded ones are there once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0]
    elements = 1
    for size in sizes:
        elements *= size
    return elements * tensor.element_size() if tensor.numel() else 0


def hrnet_part(parents: Iterable[str]) -> str:
    """The part of an HRNet that runs, from the names of the modules around it."""
    parents = list(parents)
    names = [name.split(".", 1)[1] for name in parents if "." in name]
    if not names:  # the network itself, or nothing but the tracker's "Global"
        return "stem, stage 1" if len(parents) > 1 else "loss"
    deepest = max(names, key=len)
    top = deepest.split(".")[0]
    if top.startswith("stage"):
        return "branches" if ".branches" in deepest else "fusion"
    if top.startswith(("transition", "att", "last_layer_stage")):
        return "transitions"
    return "head" if top == "last_layer" else "stem, stage 1"


def step_traffic(variant: Variant, trunk: str, batch: int, size: tuple[int, int]) -> dict[tuple[str, str], int]:
    """Bytes of one training step in bfloat16 autocast and channels_last, by part and direction."""
    network = variant.build(trunk).to(memory_format=torch.channels_last)
    fake = FakeTensorMode()
    with FakeCopyMode(fake):
        network = copy.deepcopy(network)
    with fake:
        images = torch.empty(batch, 3, *size).contiguous(memory_format=torch.channels_last)
        labels = torch.empty(batch, *size, dtype=torch.int64)
        traffic = Traffic(hrnet_part)
        with traffic:
            with torch.autocast("cpu", torch.bfloat16):
                outputs = network(images)
            loss = variant.loss(outputs, labels)
            loss.backward()
    return dict(traffic.bytes)


def traffic_table(trunk: str, batch: int, size: tuple[int, int]) -> Table:
    """Rows: parts; columns: the variants' gigabytes, forward and backward."""
    counts = {variant: step_traffic(variant, trunk, batch, size) for variant in VARIANTS}
    title = f"GB read and written by one step of {trunk}, {batch} x {size[0]}x{size[1]}, bf16: forward / backward"
    table = Table("part", *(variant.label for variant in VARIANTS), title=title)
    for part in PARTS:
        cells = [[counts[v].get((part, way), 0) / 1e9 for way in ("forward", "backward")] for v in VARIANTS]
        table.add_row(part, *(f"{forward:.2f} / {backward:.2f}" for forward, backward in cells))
    totals = [sum(counts[variant].values()) for variant in VARIANTS]
    table.add_section()
    table.add_row("all", *(f"{total / 1e9:.1f}" for total in totals))
    table.add_row("ms at 4,249 GB/s", *(f"{total / H200_BYTES_PER_SECOND * 1e3:.1f}" for total in totals))
    return table


def run(argv: Sequence[str], description: str) -> int:
    """``gsto bench traffic``."""
    parser = argparse.ArgumentParser(prog="gsto bench traffic", description=description, allow_abbrev=False)
    parser.add_argument(
        "--trunk", default="w48", choices=["w18_small_v2", "w18", "w32", "w48"], help="default: %(default)s"
    )
    parser.add_argument("--batch", type=int, default=8, help="images (default: %(default)s)")
    parser.add_argument("--size", default="512x1024", metavar="HxW", help="default: %(default)s")
    options = parser.parse_args(argv)
    at_least(1, batch=options.batch)
    Console(width=120).print(traffic_table(options.trunk, options.batch, parse_size(options.size)))
    return 0
