"""The trainer, for every task: what a run is, apart from its network, loss and data.

A task is a `TrainingTask` (network, loss, evaluation) and a `TrainingData` (data sets); `cli.py` puts them together with
everything else in this folder.
"""

from .data import TrainingData
from .task import TrainingTask

__all__ = ["TrainingData", "TrainingTask"]
