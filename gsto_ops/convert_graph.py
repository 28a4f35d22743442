"""What ``convert`` does to one traced module: it finds the scale transfers in the graph and puts gated ones in their places."""

import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .modules import GatedScaleTransfer

# Strings are methods of tensors.
_RELU = (F.relu, torch.relu, "relu", "relu_")
_MODES = {"bilinear": "bilinear", "nearest": "nearest", "area": "avg"}
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_POINTWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Dropout, nn.Dropout2d, nn.Identity)
_SAME_CHANNELS_MODULES = (*_POINTWISE, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample)
_SAME_CHANNELS = (*_RELU, F.interpolate, F.adaptive_avg_pool2d, F.max_pool2d, F.avg_pool2d, F.dropout, "contiguous")
_ELEMENTWISE = (operator.add, operator.iadd, operator.sub, operator.mul, torch.add, torch.mul, "add", "add_", "mul")
_CONCATENATION = (torch.cat, torch.concat)


@dataclass
class ConversionReport:
    """What ``convert`` did; ``print(report)`` shows it.

    Attributes:
        replaced: name of a new module in the converted network -> what it stands for.
        kept: a scale transfer that stays plain -> the reason; and modules that could not be traced.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} scale transfers gated"]
        lines += [f"  {name}: {what}" for name, what in self.replaced.items()]
        return "\n".join(lines + [f"  kept {place}: {reason}" for place, reason in self.kept.items()])


@dataclass(frozen=True)
class Options:
    """The options of ``convert``."""

    gate_bias_init: float | None
    preserve_output: bool
    gate_output: bool

    @property
    def first_gate(self) -> float:
        """The value of a gate whose weights are zero."""
        return 1 / (1 + math.exp(-(self.gate_bias_init or 0.0)))


@dataclass(frozen=True)
class _Transfer:
    """A resampling: its node, the tensor it reads, and the arguments of the module that may take its place."""

    node: fx.Node
    input: fx.Node
    pools: bool
    size: Any
    resampling: dict[str, Any]


@dataclass(frozen=True)
class _Projection:
    """The 1x1 convolution, norm and ReLU in front of a resampling, and their nodes, last one first."""

    input: fx.Node
    conv: nn.Conv2d
    norm: nn.BatchNorm2d | nn.SyncBatchNorm | None
    relu: bool
    nodes: list[fx.Node]


class _Kept(Exception):
    """This scale transfer stays plain; the message says why."""


class GraphConversion:
    """Converts one traced module in place.

    Args:
        module: the traced module. path: its name in the network, "" for the network itself.
        options: of ``convert``. report: gets an entry for every scale transfer.
    """

    def __init__(self, module: fx.GraphModule, path: str, options: Options, report: ConversionReport) -> None:
        self.module, self.graph = module, module.graph
        self.path, self.options, self.report = path, options, report
        self.modules = dict(module.named_modules())
        self.gated_pools: set[fx.Node] = set()
        targets = [node.target for node in self.graph.nodes if node.op == "call_module"]
        self.calls = {target: targets.count(target) for target in targets}

    def run(self) -> bool:
        """Convert; returns whether anything was replaced."""
        before = len(self.report.replaced)
        for node in list(self.graph.nodes):  # in the order of execution: pooling comes before its interpolation
            try:
                transfer = self._transfer(node)
                if transfer is not None:
                    self._gate_pooling(transfer) if transfer.pools else self._gate_interpolation(transfer)
            except _Kept as reason:
                place = node.target if node.op == "call_module" else node.name
                self.report.kept[self._full_name(str(place))] = str(reason)
        return len(self.report.replaced) > before

    # ---- finding

    def _transfer(self, node: fx.Node) -> _Transfer | None:
        module = self._called(node)
        if isinstance(module, nn.Upsample):
            names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
            return self._interpolation(node, {"input": node.args[0], **{name: getattr(module, name) for name in names}})
        if _calls(node, F.interpolate):
            return self._interpolation(node, _arguments(F.interpolate, node))
        if isinstance(module, nn.AvgPool2d) or _calls(node, F.avg_pool2d):
            raise _Kept("average pooling with fixed windows is not adaptive pooling")
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return self._pooling(node, node.args[0], module.output_size)
        if _calls(node, F.adaptive_avg_pool2d):
            arguments = _arguments(F.adaptive_avg_pool2d, node)
            return self._pooling(node, arguments["input"], arguments["output_size"])
        return None

    def _interpolation(self, node: fx.Node, arguments: dict[str, Any]) -> _Transfer:
        mode, size, scale_factor = arguments["mode"], arguments["size"], arguments["scale_factor"]
        if mode not in _MODES:
            raise _Kept(f"mode={mode!r} is none of {', '.join(map(repr, _MODES))}")
        for name in ("recompute_scale_factor", "antialias"):
            if arguments.get(name):
                raise _Kept(f"{name}=True has no gated form")
        if _computed(scale_factor):
            raise _Kept("its scale_factor is computed in forward")
        resampling = {"mode": _MODES[mode], "align_corners": bool(arguments["align_corners"])}
        if size is None:
            resampling["scale_factor"] = scale_factor
        elif not _computed(size):
            resampling["size"], size = size, None
        return _Transfer(node, arguments["input"], False, size, resampling)

    def _pooling(self, node: fx.Node, input: Any, size: Any) -> _Transfer:
        if not _computed(size):
            pair = size if isinstance(size, tuple) else (size, size)
            if None in pair:
                raise _Kept(f"output_size={size!r} leaves a side as it is")
            return _Transfer(node, input, True, None, {"mode": "avg", "size": pair})
        return _Transfer(node, input, True, size, {"mode": "avg"})

    def _projection(self, transfer: _Transfer) -> _Projection | None:
        """What stands between the gate and the resampling, if nothing else reads any part of it."""
        nodes: list[fx.Node] = []
        node: Any = transfer.input
        norm = None
        relu = self._is_relu(node)
        if relu:
            nodes.append(node)
            node = node.args[0]
        called = self._called(node)
        if isinstance(called, _NORMS):
            norm = called
            nodes.append(node)
            node = node.args[0]
        conv = self._conv1x1(node)
        nodes.append(node)
        if conv is None or any(len(part.users) != 1 for part in nodes):
            return None
        if any(self.calls[part.target] != 1 for part in nodes if part.op == "call_module" and not self._is_relu(part)):
            return None
        return _Projection(node.args[0], conv, norm, relu, nodes)

    def _conv1x1(self, node: Any) -> nn.Conv2d | None:
        conv = self._called(node)
        if not isinstance(conv, nn.Conv2d) or type(conv) is not nn.Conv2d or conv.groups != 1:
            return None
        plain = conv.kernel_size == conv.stride == (1, 1) and conv.padding in ((0, 0), "same", "valid")
        return conv if plain else None

    def _channels(self, node: Any) -> int | None:
        """Channels of a node's tensor, None if they cannot be told from the graph."""
        if not isinstance(node, fx.Node):
            return None
        module = self._called(node)
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, GatedScaleTransfer)):
            return module.out_channels
        if isinstance(module, _NORMS):
            return module.num_features
        if isinstance(module, nn.GroupNorm):
            return module.num_channels
        if isinstance(module, _SAME_CHANNELS_MODULES) or _calls(node, *_SAME_CHANNELS):
            return self._channels(node.args[0] if node.args else node.kwargs.get("input"))
        if _calls(node, *_ELEMENTWISE):
            counts = [self._channels(argument) for argument in node.all_input_nodes]
            return None if None in counts else max(counts)  # type: ignore[type-var]
        if _calls(node, *_CONCATENATION):
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
            counts = [self._channels(argument) for argument in node.all_input_nodes]
            return None if dim not in (1, -3) or None in counts else sum(counts)  # type: ignore[arg-type]
        return None

    # ---- replacing

    def _gate_interpolation(self, transfer: _Transfer) -> None:
        if self._made_by_gated_pooling(transfer.input):
            raise _Kept("it brings back what a gated pooling made")
        projection = self._projection(transfer)
        plain = projection is None or (projection.norm is None and not projection.relu)
        to_output = any(user.op == "output" for user in transfer.node.users)
        if plain and to_output and not self.options.gate_output:
            raise _Kept(
                "it resamples what the network, or a part traced by itself, returns (gate_output=True gates it)"
            )
        if projection is not None:
            gated = self._module(projection.conv.in_channels, transfer, projection.conv.weight)
            gated.out_channels, gated.projection = projection.conv.out_channels, projection.conv
            gated.norm = projection.norm  # type: ignore[assignment]  # any batch norm works
            gated.activation = nn.ReLU(inplace=True) if projection.relu else None
            self._divide(projection.conv)
            parts = [projection.conv, projection.norm, gated.activation]
            what = " + ".join(type(part).__name__ for part in parts if part is not None)
            self._replace(transfer, gated, projection.input, projection.nodes, f"{what} + ")
            return
        channels = self._channels(transfer.input)
        if channels is None:
            raise _Kept("the number of its channels is not known from the graph")
        gated = self._module(channels, transfer, next(self.module.parameters()))
        input = transfer.input
        if self.options.preserve_output:
            with self.graph.inserting_before(transfer.node):
                input = self.graph.call_function(torch.mul, (input, 1 / self.options.first_gate))
        self._replace(transfer, gated, input, [], "")

    def _gate_pooling(self, transfer: _Transfer) -> None:
        users = list(transfer.node.users)
        conv = self._conv1x1(users[0]) if len(users) == 1 else None
        if conv is None or self.calls[users[0].target] != 1:
            raise _Kept("the pooled map is not for a 1x1 convolution alone")
        if transfer.resampling.get("size") == (1, 1) and not self._interpolated_again(users[0]):
            raise _Kept("global pooling whose result is not interpolated again")
        gated = self._module(conv.in_channels, transfer, conv.weight)
        self._divide(conv)
        self.gated_pools.add(self._replace(transfer, gated, transfer.input, [], ""))

    def _module(self, channels: int, transfer: _Transfer, like: torch.Tensor) -> GatedScaleTransfer:
        gated = GatedScaleTransfer(channels, **transfer.resampling, gate_bias_init=self.options.gate_bias_init)
        gated.to(device=like.device, dtype=like.dtype)
        if self.options.preserve_output:
            nn.init.zeros_(gated.gate.weight)
        return gated.train(self.module.training)

    def _divide(self, conv: nn.Conv2d) -> None:
        if self.options.preserve_output:
            with torch.no_grad():
                conv.weight.div_(self.options.first_gate)

    def _replace(
        self, transfer: _Transfer, gated: GatedScaleTransfer, input: fx.Node, projection: list[fx.Node], what: str
    ) -> fx.Node:
        name = f"gated_{(projection or [transfer.node])[-1].name}"
        self.module.add_submodule(name, gated)
        self.modules[name] = gated
        with self.graph.inserting_before(transfer.node):
            new = self.graph.call_module(name, (input,) if transfer.size is None else (input, transfer.size))
        transfer.node.replace_all_uses_with(new)
        for node in (transfer.node, *projection):
            self.graph.erase_node(node)
        kind = "adaptive average pooling" if transfer.pools else f"{transfer.resampling['mode']} interpolation"
        self.report.replaced[self._full_name(name)] = f"{what}{kind}, C={gated.in_channels}"
        return new

    # ---- looking at nodes

    def _called(self, node: Any) -> nn.Module | None:
        return self.modules[node.target] if isinstance(node, fx.Node) and node.op == "call_module" else None

    def _is_relu(self, node: fx.Node) -> bool:
        return isinstance(self._called(node), nn.ReLU) or _calls(node, *_RELU)

    def _made_by_gated_pooling(self, node: fx.Node) -> bool:
        while node not in self.gated_pools:
            if len(node.all_input_nodes) != 1:
                return False
            node = node.all_input_nodes[0]
        return True

    def _interpolated_again(self, node: fx.Node) -> bool:
        while len(node.users) == 1:
            node = next(iter(node.users))
            module = self._called(node)
            if isinstance(module, nn.Upsample) or _calls(node, F.interpolate):
                return True
            if not isinstance(module, (*_POINTWISE, *_NORMS)) and not _calls(node, *_RELU, F.dropout):
                return False
        return False

    def _full_name(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def _calls(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def _arguments(function: Callable, node: fx.Node) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _computed(argument: Any) -> bool:
    """Whether an argument, or a part of it, comes out of the graph."""
    return any(isinstance(part, fx.Node) for part in (argument if isinstance(argument, (tuple, list)) else (argument,)))
