"""Fused operators for the Gated Scale-Transfer Operation (arXiv 2005.13363).

``gated_scale_transfer`` and ``supervised_gated_scale_transfer`` are the functions, ``GatedScaleTransfer`` is the module,
``reference`` is the plain PyTorch form of the same mathematics, ``python -m gsto_ops`` tells what runs on this machine.
"""

from importlib.metadata import version

from . import reference
from .backends import available_backends, use_backend
from .convert import convert
from .convert_graph import ConversionReport
from .fold import fold
from .functional import (
    affine_scale_transfer,
    gated_projection,
    gated_pyramid_pool,
    gated_scale_transfer,
    scale_transfer,
    supervised_gated_scale_transfer,
)
from .gated_fusion import gated_fusion, gated_split
from .losses import upsample_cross_entropy
from .modules import GatedScaleTransfer
from .norm_sum import norm_sum, projected_sum
from .norm_transfer import gated_batch_norm_transfer, gated_norm_transfer

__version__ = version("gsto_ops")
__all__ = [
    "ConversionReport",
    "GatedScaleTransfer",
    "affine_scale_transfer",
    "available_backends",
    "convert",
    "fold",
    "gated_batch_norm_transfer",
    "gated_fusion",
    "gated_norm_transfer",
    "gated_projection",
    "gated_pyramid_pool",
    "gated_scale_transfer",
    "gated_split",
    "norm_sum",
    "projected_sum",
    "reference",
    "scale_transfer",
    "supervised_gated_scale_transfer",
    "upsample_cross_entropy",
    "use_backend",
]
