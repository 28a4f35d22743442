"""``torch.ops.gsto_ops``: one file per operator with its schema, default kernel, fake kernel and autograd formula."""

from . import (
    affine_scale_transfer,
    batch_norm_sum,
    channel_statistics,
    class_map,
    gated_batch_norm_transfer,
    gated_projection,
    gated_pyramid_pool,
    gated_scale_transfer,
    gated_split,
    update_running_statistics,
    upsample_cross_entropy,
)
from .library import autocast_operands, layout_of

__all__ = [
    "affine_scale_transfer",
    "autocast_operands",
    "batch_norm_sum",
    "channel_statistics",
    "class_map",
    "gated_batch_norm_transfer",
    "gated_projection",
    "gated_pyramid_pool",
    "gated_scale_transfer",
    "gated_split",
    "layout_of",
    "update_running_statistics",
    "upsample_cross_entropy",
]
