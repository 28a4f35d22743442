"""Scale equalizers (arXiv 2402.01149): levels that were upsampled and concatenated enter their fusion with equal scale."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import plain_composition


class EqualizedConv2d(nn.Conv2d):
    """A fusion's convolution that first gives every level of its input mean 0 and standard deviation 1.

    Bilinear upsampling takes variance away, the more the larger its factor, so the weights of low-resolution levels get
    smaller gradients. A level's mean and standard deviation are two constants, measured once over the data (over all
    pixels and channels of the level) by `measure_scales`, not learned. The normalisation never runs on the features:

        conv((x_k - mean_k) / std_k) = conv'(x) with weight'_k = weight_k / std_k, bias' = bias - sum weight'_k * mean_k.

    At the border of a padded convolution (3x3) the padding stays 0 in x, not in the normalised map, so that folding is
    exact there too.

    Args:
        levels: the channels of each level, in the order of concatenation.
        out_channels: channels of the output.
        kernel_size: odd; the convolution keeps the size, and it has a bias.
    """

    level_mean: Tensor
    level_std: Tensor

    def __init__(self, levels: Sequence[int], out_channels: int, kernel_size: int) -> None:
        super().__init__(sum(levels), out_channels, kernel_size, padding=kernel_size // 2)
        self.levels = tuple(levels)
        self.register_buffer("level_mean", torch.zeros(len(levels)))
        self.register_buffer("level_std", torch.ones(len(levels)))

    def effective(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the equal convolution without equalizer."""
        mean, std = (
            torch.cat([x.expand(channels) for x, channels in zip(scalars.unbind(), self.levels, strict=True)])
            for scalars in (self.level_mean, self.level_std)
        )
        weight = self.weight / std[:, None, None]
        assert self.bias is not None
        return weight, self.bias - (weight * mean[:, None, None]).sum((1, 2, 3))

    def forward(self, input: Tensor) -> Tensor:
        """Map the concatenated levels (N, sum of levels, H, W) to (N, out_channels, H, W)."""
        return F.conv2d(input, *self.effective(), padding=self.padding)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, levels={self.levels}"


def fusion_conv(
    levels: Sequence[int], out_channels: int, kernel_size: int = 1, *, bias: bool = True, equalize: bool = False
) -> nn.Conv2d:
    """The convolution behind a concatenation of levels; with `equalize` it has a scale equalizer (and always a bias)."""
    if equalize:
        return EqualizedConv2d(levels, out_channels, kernel_size)
    return nn.Conv2d(sum(levels), out_channels, kernel_size, padding=kernel_size // 2, bias=bias)


def effective_parameters(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that a fusion's convolution applies to the concatenated levels."""
    return conv.effective() if isinstance(conv, EqualizedConv2d) else (conv.weight, conv.bias)


@torch.no_grad()
def measure_scales(model: nn.Module, batches: Iterable[Tensor | Sequence[Any]]) -> None:
    """Set the scale equalizers of `model` by one pass over the data; they start as the identity.

    The network runs in the mode it is in: in training mode (batch statistics) for a fresh network, as it will be
    trained; in eval mode for one whose BatchNorm statistics are those of a trained network. Nothing but the
    equalizers changes: BatchNorm's running statistics are as before. Call it before training, after weights were loaded.

    Args:
        model: a network made with `scale_equalizer=True`. Changed in place.
        batches: batches of images (N, 3, H, W), or tuples that start with one, for example a DataLoader. Images are
            brought to the model's device.

    Raises:
        ValueError: no equalizer in the model, no batch, or a level that is constant or not finite over the data.
    """
    convs = dict(_equalized(model))
    if not convs:
        raise ValueError("model has no scale equalizer: create it with scale_equalizer=True")
    device = next(model.parameters()).device
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    moments = {
        name: torch.zeros(3, len(conv.levels), dtype=torch.float64, device=device) for name, conv in convs.items()
    }
    try:
        for conv in convs.values():
            conv.level_mean.zero_()
            conv.level_std.fill_(1.0)
        with plain_composition(model), _observe(convs, moments):
            for batch in batches:
                images = batch if isinstance(batch, Tensor) else batch[0]
                model(images.to(device))
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    scales = {}
    for name, (count, total, squares) in moments.items():
        if not count.all():
            raise ValueError("batches must contain at least one batch of images, got none")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        for level, (m, s) in enumerate(zip(mean.tolist(), std.tolist(), strict=True)):
            if not (0 < s < float("inf")):  # NaN, too, fails this
                raise ValueError(f"level {level} of {name} has mean {m} and standard deviation {s} over the batches")
        scales[name] = mean, std
    for name, (mean, std) in scales.items():
        convs[name].level_mean.copy_(mean)
        convs[name].level_std.copy_(std)


@torch.no_grad()
def fold_scales(model: nn.Module) -> None:
    """Fold every scale equalizer into the weights of its convolution, which becomes a plain `nn.Conv2d`.

    The output stays the same within rounding. Measured and folded before training this is the paper's cost-free
    initialisation; folded after training it takes the equalizers' buffers out of the state dict.

    Args:
        model: a network made with `scale_equalizer=True`. Changed in place. An optimizer must be made after this.

    Raises:
        ValueError: no equalizer in the model.
    """
    convs = dict(_equalized(model))
    if not convs:
        raise ValueError("model has no scale equalizer to fold: it was made without scale_equalizer, or it is folded")
    for name, conv in convs.items():
        parent, _, child = name.rpartition(".")
        plain = fusion_conv(conv.levels, conv.out_channels, conv.kernel_size[0]).to(
            conv.weight.device, conv.weight.dtype
        )
        weight, bias = conv.effective()
        plain.weight.copy_(weight)
        assert plain.bias is not None
        plain.bias.copy_(bias)
        setattr(model.get_submodule(parent), child, plain.train(conv.training))


def _equalized(model: nn.Module) -> Iterator[tuple[str, EqualizedConv2d]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, EqualizedConv2d))


@contextmanager
def _observe(convs: dict[str, EqualizedConv2d], moments: dict[str, Tensor]) -> Iterator[None]:
    """Add count, sum and sum of squares of every level that comes into the convolutions to `moments`."""
    handles = [conv.register_forward_pre_hook(partial(_add_moments, moments[name])) for name, conv in convs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_moments(moments: Tensor, conv: nn.Module, inputs: tuple[Tensor]) -> None:
    assert isinstance(conv, EqualizedConv2d)
    for level, x in enumerate(inputs[0].double().split(list(conv.levels), 1)):
        moments[:, level] += torch.stack([x.new_tensor(x.numel()), x.sum(), x.square().sum()])
