"""What the gated modules share: how a gate starts, and how gates are looked at."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

from torch import Tensor, nn

GATE_FORMS = ("paper", "released")

GateRecorder = Callable[[str, Tensor], None]


class GatedModule(nn.Module, ABC):
    """Base of the modules that compute gates; `gate_recorder` is None except inside `record_gates`."""

    gate_recorder: GateRecorder | None = None

    @abstractmethod
    def gate_layers(self) -> Iterator[nn.Module]:
        """Yield, for every gate of this module, the layers that compute its logit."""

    def start_gates(self, gate_bias_init: float | None) -> None:
        """Give every gate its first bias, the value its logit has while its weights are still small.

        The bias belongs to the last layer of the logit: the convolution's own bias where the logit is a plain
        convolution, the bias of the last BatchNorm where BatchNorm and ReLU follow. Adding it behind that ReLU instead
        would make sigmoid(bias) the gate's lower bound (0.98 for 4), so the gate could not close any more; in front of
        it a positive value keeps the ReLU alive, and a checkpoint has the same keys with it and without it.

        Args:
            gate_bias_init: the first bias; None leaves the gates as the layers' initialisation made them.
        """
        if gate_bias_init is None:
            return
        for layers in self.gate_layers():
            biases = [layer.bias for layer in layers.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
            nn.init.constant_(cast(Tensor, biases[-1]), gate_bias_init)


@contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the gates that `model` computes while the context is open.

    Args:
        model: any network of this package (the network itself, not what `torch.compile` returned for it).

    Yields:
        A dict that every forward pass fills: the gate's name, for example "stage4.1.att_layers.0.3" (target branch 0,
        source branch 3) or "att3" -> gate (N, 1, H, W), detached; (N, C, 1, 1) for channel gates. Empty for a network
        without gates.
    """
    gates: dict[str, Tensor] = {}
    gated = {name: module for name, module in model.named_modules() if isinstance(module, GatedModule)}
    before = {name: module.gate_recorder for name, module in gated.items()}
    for name, module in gated.items():
        module.gate_recorder = partial(_record, gates, name)
    try:
        yield gates
    finally:
        for name, module in gated.items():
            module.gate_recorder = before[name]


def _record(gates: dict[str, Tensor], module_name: str, gate_name: str, gate: Tensor) -> None:
    gates[".".join(filter(None, (module_name, gate_name)))] = gate.detach()
