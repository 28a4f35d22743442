"""``convert``: plain scale transfers in somebody's network become gated ones, found by ``torch.fx``."""

import copy
import inspect
import math

from torch import fx, nn

from .convert_graph import ConversionReport, GraphConversion, Options


def convert(
    model: nn.Module,
    *,
    gate_bias_init: float | None = 4.0,
    preserve_output: bool = False,
    gate_output: bool = False,
) -> tuple[nn.Module, ConversionReport]:
    """Replace plain scale transfers of a network by gated ones (arXiv 2005.13363, Section 3.1).

    These become :class:`GatedScaleTransfer`:

    - a 1x1 convolution (and batch norm, and ReLU) followed by interpolation (``F.interpolate`` or ``nn.Upsample``, bilinear,
      nearest or area): gate, project, normalise, activate, resample. Convolution and norm go on as they are;
    - interpolation of anything else whose number of channels is known: gate, resample;
    - adaptive average pooling followed by a 1x1 convolution: gate, pool, and the convolution as before. Global pooling only
      if its result is interpolated again, so neither the end of a classifier nor channel attention. The interpolation
      of what such a pooling made stays plain: one gate per bin (Fig. 4).

    The network is traced by ``torch.fx`` as a whole; where that cannot be done, its parts are, each for itself. A traced
    module is a ``torch.fx.GraphModule`` afterwards, with the old names of the parameters that were not touched; what its
    ``forward`` decides by ``self.training`` stays as it was at the conversion.

    Args:
        model: the network; it is not changed.
        gate_bias_init: None, or the number that every gate's logit starts from: 4 starts the gates open, at 0.98.
        preserve_output: True starts with gate weights of zero, and divides the gates' first value out of the convolution
            behind them (without one, out of the input): the output is that of ``model`` up to rounding, and gates move
            away from it in training. False (default) draws the gate weights at random.
        gate_output: also gate interpolation without a norm or ReLU before it whose result is what the network (or a part
            traced by itself) returns: that is how logits are brought to the size of the image. Default False.

    Returns:
        (network, report): the converted copy, in the mode of ``model``, and what was replaced, what not, and why not.

    Raises:
        TypeError: an argument of the wrong type. ValueError: ``gate_bias_init`` is not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(gate_bias_init, bool) or not isinstance(gate_bias_init, (int, float, type(None))):
        raise TypeError(f"gate_bias_init must be a number or None, got {gate_bias_init!r}")
    if gate_bias_init is not None and not math.isfinite(gate_bias_init):
        raise ValueError(f"gate_bias_init must be finite, got {gate_bias_init!r}")
    for name, value in (("preserve_output", preserve_output), ("gate_output", gate_output)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    report = ConversionReport()
    options = Options(gate_bias_init, preserve_output, gate_output)
    return _convert(copy.deepcopy(model), "", options, report), report


def _convert(module: nn.Module, path: str, options: Options, report: ConversionReport) -> nn.Module:
    """The converted module; where it cannot be traced, the module with its children converted."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return _convert_children(module, path, options, report)
    try:
        _check_arguments(module, path)
        graph = fx.Tracer().trace(module)
    except Exception as error:  # a forward that runs on proxies may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        report.kept[path or type(module).__name__] = f"torch.fx cannot trace it, its parts were tried: {reason}"
        return _convert_children(module, path, options, report)
    graph_module = fx.GraphModule(module, graph, type(module).__name__)
    if not GraphConversion(graph_module, path, options, report).run():
        return module
    graph.lint()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module


def _convert_children(module: nn.Module, path: str, options: Options, report: ConversionReport) -> nn.Module:
    for name, child in module.named_children():
        if next(child.children(), None) is not None:  # a layer by itself has no scale transfer whose channels are known
            setattr(module, name, _convert(child, f"{path}.{name}" if path else name, options, report))
    return module


def _check_arguments(module: nn.Module, path: str) -> None:
    """Tracing takes every argument for a given one, so in a part it would decide `if skip is not None` once for all."""
    arguments = inspect.signature(module.forward).parameters.values()
    if path and any(a.default is not a.empty or a.kind in (a.VAR_POSITIONAL, a.VAR_KEYWORD) for a in arguments):
        raise TypeError("its forward has optional arguments")
