"""The operators in plain PyTorch (Equations 1-6 of the paper): the oracle of the tests, and what runs where no kernel is built.

One file per operator. These functions trust their arguments; ``gsto_ops.functional`` checks them. The explicit ``*_backward``
functions are the default kernels of the backward operators; the forward functions are differentiable as they are.
"""

from .affine_scale_transfer import affine_scale_transfer, affine_scale_transfer_backward
from .batch_norm_sum import batch_norm_sum, batch_norm_sum_backward, batch_norm_sum_backward_terms
from .channel_statistics import channel_statistics
from .class_map import class_map, class_map_backward
from .gated_batch_norm_transfer import gated_batch_norm_transfer
from .gated_projection import gated_projection, gated_projection_backward
from .gated_pyramid_pool import gated_pyramid_pool, gated_pyramid_pool_backward
from .gated_scale_transfer import gated_scale_transfer, gated_scale_transfer_backward, supervised_gated_scale_transfer
from .gated_split import gated_split, gated_split_backward
from .parts import statistics_dtype
from .scale_transfer import adaptive_pool, scale_transfer, scale_transfer_backward
from .update_running_statistics import update_running_statistics_
from .upsample_cross_entropy import upsample_cross_entropy, upsample_cross_entropy_backward

__all__ = [
    "adaptive_pool",
    "affine_scale_transfer",
    "affine_scale_transfer_backward",
    "batch_norm_sum",
    "batch_norm_sum_backward",
    "batch_norm_sum_backward_terms",
    "channel_statistics",
    "class_map",
    "class_map_backward",
    "gated_batch_norm_transfer",
    "gated_projection",
    "gated_projection_backward",
    "gated_pyramid_pool",
    "gated_pyramid_pool_backward",
    "gated_scale_transfer",
    "gated_scale_transfer_backward",
    "gated_split",
    "gated_split_backward",
    "scale_transfer",
    "scale_transfer_backward",
    "statistics_dtype",
    "supervised_gated_scale_transfer",
    "update_running_statistics_",
    "upsample_cross_entropy",
    "upsample_cross_entropy_backward",
]
