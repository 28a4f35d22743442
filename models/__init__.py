"""Networks made of gated scale transfers: HRNetV2 and GSTO-HRNet (arXiv 2005.13363)."""

from .checkpoints import LoadReport, load_checkpoint, read_checkpoint, save_checkpoint
from .complexity import Complexity, complexity
from .config import Options
from .fold import fold
from .fused import set_fused
from .gates import record_gates
from .hrnet import HRNet
from .opening import absorb_initial_gates
from .registry import create_model, list_models
from .resnet_networks import PyramidOptions, ResNetSegmenter, RSPOptions
from .scale_equalizer import fold_scales, measure_scales

__all__ = [
    "Complexity",
    "HRNet",
    "LoadReport",
    "Options",
    "PyramidOptions",
    "RSPOptions",
    "ResNetSegmenter",
    "absorb_initial_gates",
    "complexity",
    "create_model",
    "fold",
    "fold_scales",
    "list_models",
    "load_checkpoint",
    "measure_scales",
    "read_checkpoint",
    "record_gates",
    "save_checkpoint",
    "set_fused",
]
