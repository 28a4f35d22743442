"""Parameters and multiply-adds of a network, in the convention of the paper's tables and exactly."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gsto_ops  # noqa: F401  (defines torch.ops.gsto_ops)

from .feature_gates import FeatureHead
from .fused import plain_composition
from .gated_transition import TransitionTransfer


@dataclass(frozen=True)
class Complexity:
    """What a network costs for one image.

    Attributes:
        params: all parameters.
        conv_params: weights and biases of convolutions only, the convention of the paper's segmentation tables.
        macs_as_defined: multiply-adds of the convolutions (and of attention's matrix products) as the paper's equations
            define them: every projection of a gated scale transfer at the size of its input, and the class map of every
            supervised gate. Gate products, BatchNorm and resampling are not counted.
        macs_as_executed: the same, with projections of fused gated scale transfers at the smaller one of their input
            and output sizes, which is where the operator may compute them (the reference backend does not), convolutions
            over concatenated branches at each branch's own resolution, and without the class maps that eval mode folds into
            the gates of PPM and ASPP.
    """

    params: int
    conv_params: int
    macs_as_defined: int
    macs_as_executed: int

    @property
    def gflops(self) -> float:
        """The paper's "GFLOPs": multiply-adds as defined, divided by 2**30."""
        return self.macs_as_defined / 2**30

    def __str__(self) -> str:
        return (
            f"{self.params:,} parameters ({self.conv_params:,} in convolutions), "
            f"{self.macs_as_defined:,} multiply-adds as defined ({self.gflops:.3f} GFLOPs in the paper's convention), "
            f"{self.macs_as_executed:,} as executed"
        )


def complexity(model: nn.Module, input_size: Sequence[int]) -> Complexity:
    """Count parameters and multiply-adds of `model` in eval mode; nothing is computed, so that any size is quick.

    The class maps of gated transitions are counted: the gates need them, and the paper's numbers include them.

    Args:
        model: a network that takes (N, 3, H, W); it is not changed.
        input_size: (H, W) of one image.

    Raises:
        ValueError: `input_size` is not two positive integers, or too small for the network.
    """
    size = tuple(input_size)
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"input_size must be two positive integers (height, width), got {input_size!r}")
    params = sum(p.numel() for p in model.parameters())
    convs = (m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd))
    conv_params = sum(p.numel() for conv in convs for p in conv.parameters())
    fake, counter, executed = FakeTensorMode(), _MultiplyAdds(), _MultiplyAdds()
    with torch.inference_mode(False), torch.no_grad():
        with FakeCopyMode(fake):
            model = copy.deepcopy(model).eval()
        parameter = next(model.parameters())
        with fake:
            image = torch.empty(1, 3, *size, dtype=parameter.dtype, device=parameter.device)
            with executed:
                model(image)
            for head in model.modules():
                if isinstance(head, FeatureHead | TransitionTransfer):
                    head.register_forward_pre_hook(counter.add_class_map)
            with counter, plain_composition(model):
                model(image)
    return Complexity(params, conv_params, counter.as_defined, executed.as_executed)


class _MultiplyAdds(TorchDispatchMode):
    """Counts the multiply-adds of every convolution and gated scale transfer that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.as_defined = 0
        self.as_executed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            input, weight, transposed = args[0], args[1], args[6]
            pixels_and_channels = input if transposed else output
            self._add(pixels_and_channels.numel() * weight[0].numel())
        elif func is torch.ops.gsto_ops.gated_scale_transfer.default:
            # A projection commutes with the resampling, so it may run at the smaller size, unless a ReLU stands between.
            self._add_gated(args[0], args[3], output[0] if args[5] == "none" else args[0])
        elif func in (
            torch.ops.gsto_ops.gated_projection.default,
            torch.ops.gsto_ops.gated_batch_norm_transfer.default,
        ):
            self._add_gated(args[0], args[3], args[0])
        elif func is torch.ops.gsto_ops.gated_split.default:
            rows = args[1].shape[0] + sum(args[4])  # the logits of all gates, and the projections
            self._add(args[0][:, 0].numel() * args[0].shape[1] * rows)
        elif func is torch.ops.gsto_ops.gated_pyramid_pool.default:
            self._add(args[0].numel() * args[1].shape[0])  # the logits of all gates
        elif func is torch.ops.gsto_ops.class_map.default:
            self._add(output.numel() * args[0].shape[1])
        elif func is torch.ops.aten.bmm.default:
            self._add(output.numel() * args[0].shape[2])
        return output

    def add_class_map(self, head: nn.Module, inputs: tuple[Tensor]) -> None:
        """Count, as defined, what a module with supervised gates saves by folding its predictor into them."""
        assert isinstance(head, FeatureHead | TransitionTransfer)
        self._add(head.multiply_adds_saved(inputs[0]), 0)

    def _add_gated(self, input: Tensor, weight: Tensor | None, resampled: Tensor) -> None:
        self._add(input.numel())  # the gate's logit
        if weight is not None:
            pixels, pixels_after = input[:, 0].numel(), resampled[:, 0].numel()
            self._add(pixels * weight.numel(), min(pixels, pixels_after) * weight.numel())

    def _add(self, as_defined: int, as_executed: int | None = None) -> None:
        self.as_defined += as_defined
        self.as_executed += as_defined if as_executed is None else as_executed
