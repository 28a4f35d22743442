"""The RSP head (arXiv 2106.01744): low-level pixels attend to the region around them in the next higher level.

The paper fixes the roles: a feature pyramid; the Relational Semantics Extractor (RSE), a cross-scale pixel-to-region
relation with a positional embedding between adjacent levels; the Relational Semantics Propagator (RSP), which takes
that context into the level; RSPs stacked top-down. Choices made here: scaled dot-product attention with several heads,
an embedding per position of the region that is added to the keys, and a 3x3 convolution as the propagator.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import conv_norm_relu


def local_attention(query: Tensor, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
    """Every low-level pixel attends to a k x k region of the higher level around its own position.

    The pixel (y, x) lies in the cell (y // r, x // r) of the higher level, r = ceil(H / h); its region are the k x k
    cells around that one, as far as they are inside the map. For every head with d channels

        output(y, x) = sum_o softmax_o(query(y, x) . (key(o) + position(o)) / sqrt(d)) value(o).

    Args:
        query: (N, heads * d, H, W), the low level.
        key: (N, heads * d, h, w), the higher level, where h = ceil(H / r) and w = ceil(W / r) for an integer r.
        value: (N, heads * e, h, w).
        position: (heads, d, k * k), the embedding of the region's cells, row by row; k odd.

    Returns:
        (N, heads * e, H, W).

    Raises:
        ValueError: sizes that do not belong to each other.
    """
    (n, _, height, width), (h, w) = query.shape, key.shape[-2:]
    heads, d, cells = position.shape
    r = (height + h - 1) // h
    if ((height + r - 1) // r, (width + r - 1) // r) != (h, w) or value.shape[-2:] != key.shape[-2:]:
        raise ValueError(
            f"query must be larger than key and value by an integer factor (rounded up), "
            f"got sizes {height}x{width}, {h}x{w} and {value.shape[-2]}x{value.shape[-1]}"
        )
    k = round(cells**0.5)
    if k * k != cells or k % 2 == 0:
        raise ValueError(f"position must be (heads, channels, k * k) with an odd k, got shape {tuple(position.shape)}")
    # The r x r pixels of a cell share their region, so that keys and values are unfolded at the higher level's size.
    query = F.pad(query, (0, w * r - width, 0, h * r - height)).reshape(n, heads, d, h, r, w, r)
    keys = F.unfold(key, k, padding=k // 2).reshape(n, heads, d, cells, h, w) + position[:, :, :, None, None]
    values = F.unfold(value, k, padding=k // 2).reshape(n, heads, value.shape[1] // heads, cells, h, w)
    inside = F.unfold(key.new_ones(1, 1, h, w), k, padding=k // 2).reshape(cells, h, 1, w, 1) > 0
    logits = torch.einsum("bnchiwj,bncohw->bnohiwj", query, keys) / d**0.5
    weights = logits.masked_fill(~inside, float("-inf")).softmax(2)
    output = torch.einsum("bnohiwj,bncohw->bnchiwj", weights, values)
    return output.reshape(n, value.shape[1], h * r, w * r)[:, :, :height, :width]


class RelationalSemanticsExtractor(nn.Module):
    """RSE: the context that the pixels of a level find in the next higher level, `local_attention` of 1x1 projections.

    Args:
        channels: of both levels and of the context.
        region_size: k, odd; the region has k x k cells of the higher level.
        heads: attention heads; they share the channels.
    """

    def __init__(self, channels: int, region_size: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels, 1, bias=False)
        self.key = nn.Conv2d(channels, channels, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.position = nn.Parameter(torch.empty(heads, channels // heads, region_size**2))
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """Map the level (N, C, H, W) and the next higher one (N, C, ceil(H / 2), ceil(W / 2)) to (N, C, H, W)."""
        return local_attention(self.query(low), self.key(high), self.value(high), self.position)


class RelationalSemanticsPropagator(nn.Module):
    """RSP: takes the extractor's context into the level: 3x3 convolution of both, concatenated, BatchNorm, ReLU.

    Args:
        channels, region_size, heads: as of `RelationalSemanticsExtractor`.
    """

    def __init__(self, channels: int, region_size: int, heads: int) -> None:
        super().__init__()
        self.extractor = RelationalSemanticsExtractor(channels, region_size, heads)
        self.fuse = conv_norm_relu(2 * channels, channels, 3)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """Map a level and the next higher one to the level with its context, (N, C, H, W)."""
        return self.fuse(torch.cat([low, self.extractor(low, high)], 1))


class RSPHead(nn.Module):
    """A feature pyramid's laterals, a stack of RSPs from the top level down to the first, and a classifier on that.

    Args:
        in_channels: channels of the backbone's levels, highest resolution first.
        num_classes: channels of the logits.
        channels: of the pyramid.
        region_size: k, odd: each pixel attends to k x k cells of the next higher level.
        heads: attention heads.
    """

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, *, channels: int = 128, region_size: int = 5, heads: int = 4
    ) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(conv_norm_relu(c, channels, 1) for c in in_channels)
        self.propagators = nn.ModuleList(
            RelationalSemanticsPropagator(channels, region_size, heads) for _ in in_channels[1:]
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map the backbone's levels to [logits (N, num_classes, H, W)], the size of the first level."""
        levels = [lateral(feature) for lateral, feature in zip(self.laterals, features, strict=True)]
        context = levels.pop()
        for propagator, level in zip(reversed(self.propagators), reversed(levels), strict=True):
            context = propagator(level, context)
        return [self.classifier(context)]
