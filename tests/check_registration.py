"""Fails unless every operator has native kernels for CPU and CUDA, and a fake kernel, under one schema in each namespace."""

import sys

import torch

import gsto_ops
from gsto_ops.ops.library import libraries

NAMES = (
    "gated_scale_transfer",
    "gated_projection",
    "affine_scale_transfer",
    "gated_pyramid_pool",
    "upsample_cross_entropy",
    "gated_split",
    "batch_norm_sum",
)
operators = [name + suffix for name in NAMES for suffix in ("", "_backward")]
operators += ["batch_norm_sum_backward_terms", "channel_statistics", "update_running_statistics_"]
# For CPUs alone. Elsewhere they are made of others: of gated_projection and affine_scale_transfer, and of a convolution.
composed = [name + suffix for name in ("gated_batch_norm_transfer", "class_map") for suffix in ("", "_backward")]
operators += composed
missing = []
for name in operators:
    schemas = [
        str(getattr(getattr(torch.ops, namespace), name).default._schema).split("::")[1] for namespace in libraries
    ]
    if len(set(schemas)) != 1:
        missing.append(f"{name}: schemas differ: {schemas}")
    for key in ("CPU", "CUDA", "Meta"):
        if name in composed and key == "CUDA":
            continue
        has_fake = key == "Meta" and torch._library.simple_registry.singleton.find(f"gsto_ops::{name}").fake_impl.kernel
        if not has_fake and not torch._C._dispatch_has_kernel_for_dispatch_key(f"gsto_ops::{name}", key):
            missing.append(f"{name}: no kernel for {key}")
        elif key in ("CPU", "CUDA"):
            source = torch._C._dispatch_dump(f"gsto_ops::{name}")
            line = next((text for text in source.splitlines() if text.startswith(f"{key}:")), "")
            if "csrc" not in line:
                missing.append(f"{name}: the kernel for {key} is not the compiled one: {line or 'none'}")
print(
    "\n".join(missing) or f"{len(operators)} operators: compiled kernels for CPU and CUDA, fake kernels, equal schemas"
)
print(gsto_ops.backends.report())
sys.exit(bool(missing))
