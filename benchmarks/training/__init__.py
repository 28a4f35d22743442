"""The trainer, for every task: what a run is, apart from its network, loss and data.

A task is a `TrainingTask` (network, loss, evaluation) and a data module whose `train_dataloader` gives a
`gsto_benchmarks.sampling.TrainLoader`; `cli.py` puts them together with everything else in this folder.
"""

from .task import TrainingTask

__all__ = ["TrainingTask"]
