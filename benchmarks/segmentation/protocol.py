"""How a network is applied to an image of any size; the names of the metrics come from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True)
class Protocol:
    """An evaluation protocol.

    At every scale the logits (the mean of the image's and the mirrored image's, the mean over overlapping windows) are
    upsampled to the label's size; the scales' maps are then fused: the sum of `softmax(logits)`, or of `exp(logits)`.

    Args:
        scales: factors of the image's size, each > 0.
        flip: average with the mirrored image.
        fuse: "softmax", or "exp" as HRNet's code does, which gives a scale with larger logits more weight.
        long_side: length in pixels of the image's long side at scale 1; None: the image's own.
        window: (height, width): apply the network to windows of this size; smaller images are padded to it with 0. None: to
            the whole image.
        stride: (vertical, horizontal) steps from window to window, at most the window's size; None: windows side by side.
        window_above: windows are used at scales above this one only.
        squash_label: (height, width) that labels are resized to, a quick protocol that no paper reports; None: every
            pixel of the label counts.

    Raises:
        ValueError: an argument out of range; it names the argument.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    fuse: Literal["softmax", "exp"] = "softmax"
    long_side: int | None = None
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    window_above: float = 0.0
    squash_label: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales must be one or more numbers > 0, got {list(self.scales)}")
        if self.fuse not in ("softmax", "exp"):
            raise ValueError(f"fuse must be 'softmax' or 'exp', got {self.fuse!r}")
        if self.long_side is not None and self.long_side < 1:
            raise ValueError(f"long_side must be >= 1, got {self.long_side}")
        for name in ("window", "stride", "squash_label"):
            size = getattr(self, name)
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise ValueError(f"{name} must be (height, width) with both >= 1, got {tuple(size)}")
        if self.stride is not None:
            if self.window is None:
                raise ValueError(f"stride {self.stride} needs a window")
            if any(step > side for step, side in zip(self.stride, self.window, strict=True)):
                raise ValueError(f"stride must not exceed the window {self.window}, got {self.stride}")

    @property
    def name(self) -> str:
        """The metrics' suffix: ss or ms (one or several scales), then _flip, _exp and _squashed where they apply."""
        parts = ["ms" if len(self.scales) > 1 else "ss"]
        if self.scales != (1.0,) and len(self.scales) == 1:
            parts[0] += f"{self.scales[0]:g}"
        parts += ["flip"] * self.flip
        parts += ["exp"] * (self.fuse == "exp")
        parts += ["squashed"] * (self.squash_label is not None)
        return "_".join(parts)


def by_name(*protocols: Protocol) -> dict[str, Protocol]:
    """A data set's protocols under their names."""
    return {protocol.name: protocol for protocol in protocols}
