"""Networks for the commands that look at one or write it: by name, with the weights of any file that this package knows."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gsto_models


def load_network(name: str | None, checkpoint: Path | None = None, **options: Any) -> nn.Module:
    """A network in eval mode.

    Args:
        name: of `gsto_models.list_models()`. None: the checkpoint's.
        checkpoint: weights of any layout that `gsto_models.load_checkpoint` knows, or a checkpoint of `gsto fit` or `gsto
            demo`, which brings the name and options of its network along. None for fresh weights.
        **options: of `gsto_models.create_model`, where the checkpoint does not bring them; None leaves one open.

    Raises:
        ValueError: an unknown name, a checkpoint of another network, no name. FileNotFoundError: no such file.
    """
    options = {key: value for key, value in options.items() if value is not None}
    contents = None if checkpoint is None else _read_own(checkpoint)
    if contents is None:
        if name is None:
            raise ValueError("a model name is needed: only checkpoints of gsto fit and gsto demo bring theirs along")
        return gsto_models.create_model(name, pretrained=checkpoint, **options).eval()
    # the trainers, only where a file is theirs
    if any(key.startswith("network.final_layer.") for key in contents["state_dict"]):  # the head of pose networks
        from .pose import PoseTask as Task
    else:
        from .segmentation import SegmentationTask as Task

    task = Task.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    if name not in (None, task.hparams.name):
        raise ValueError(f"{checkpoint} holds a {task.hparams.name}, not a {name}")
    return task.network.eval()


def _read_own(checkpoint: Path) -> dict[str, Any] | None:
    """The contents of a checkpoint of the trainers; None for other files, those that cannot be read included: their loader
    reports them."""
    if checkpoint.suffix == ".safetensors" or not checkpoint.is_file():
        return None
    try:
        contents = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError):
        return None
    return contents if "hyper_parameters" in contents else None
