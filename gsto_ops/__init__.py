"""Fused operators for the Gated Scale-Transfer Operation (arXiv 2005.13363).

``gated_scale_transfer`` and ``supervised_gated_scale_transfer`` are the functions, ``GatedScaleTransfer`` is the module,
``reference`` is the plain PyTorch form of the same mathematics, ``python -m gsto_ops`` tells what runs on this machine.
"""

from importlib.metadata import version

from . import reference
from .backends import available_backends, use_backend
from .functional import gated_scale_transfer, scale_transfer, supervised_gated_scale_transfer
from .modules import GatedScaleTransfer

__version__ = version("gsto_ops")
__all__ = [
    "GatedScaleTransfer",
    "available_backends",
    "gated_scale_transfer",
    "reference",
    "scale_transfer",
    "supervised_gated_scale_transfer",
    "use_backend",
]
