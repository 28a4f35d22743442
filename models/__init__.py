"""Networks made of gated scale transfers: HRNetV2 and GSTO-HRNet (arXiv 2005.13363)."""

from .complexity import Complexity, complexity
from .config import Options
from .gates import record_gates
from .hrnet import HRNet
from .opening import absorb_initial_gates
from .registry import create_model, list_models

__all__ = [
    "Complexity",
    "HRNet",
    "Options",
    "absorb_initial_gates",
    "complexity",
    "create_model",
    "list_models",
    "record_gates",
]
