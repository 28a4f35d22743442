"""``GatedScaleTransfer``: the operator with its parameters, as a module to drop into a network."""

from typing import Any, Literal

from torch import Tensor, nn

from . import checks
from .checks import ScaleFactor, Size
from .functional import Activation, collapse_gate, gated_scale_transfer
from .norm_transfer import gated_norm_transfer


class GatedScaleTransfer(nn.Module):
    """Gated scale transfer (arXiv 2005.13363, Section 3.1, Fig. 2): gate, multiply, project (1x1 conv, norm, ReLU), resample.

    Args:
        in_channels: channels C of the input.
        out_channels: channels C' of the output; None (default) or ``in_channels`` means no projection. Projection, norm and
            activation exist only if the channel count changes.
        scale_factor, size: how the output size follows from the input's, or the size itself; at most one of them. With
            neither, ``forward`` must be given the size.
        mode: ``"bilinear"``, ``"avg"``, ``"nearest"``, or ``"auto"`` (default): average pooling where neither side grows,
            bilinear interpolation otherwise.
        num_classes: None (default) for the unsupervised form; a number c0 for the supervised form, whose forward returns
            (output, class_map).
        norm: ``"batch"`` (default; the projection then has no bias) or None.
        activation: ``"relu"`` (default) or None.
        align_corners: as in ``F.interpolate``, used by bilinear resampling. Default False.
        gate_bias_init: None (default): the gate has no bias, as in the paper, and starts near 0.5. A number: a learnable
            bias that starts there; +4 starts the gates open (0.98).

    Shapes: input (N, C, H, W); output (N, C', H', W'); class_map (N, c0, H, W).

    Raises:
        ValueError, TypeError: an argument that cannot work, named.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        scale_factor: ScaleFactor | None = None,
        size: Size | None = None,
        mode: Literal["auto", "bilinear", "avg", "nearest"] = "auto",
        num_classes: int | None = None,
        norm: Literal["batch"] | None = "batch",
        activation: Literal["relu"] | None = "relu",
        align_corners: bool = False,
        gate_bias_init: float | None = None,
    ) -> None:
        super().__init__()
        counts = {"in_channels": in_channels, "out_channels": out_channels, "num_classes": num_classes}
        for name, count in counts.items():
            optional = name != "in_channels"
            if not (optional and count is None) and (
                isinstance(count, bool) or not isinstance(count, int) or count < 1
            ):
                raise ValueError(f"{name} must be a positive int{' or None' if optional else ''}, got {count!r}")
        if size is not None and scale_factor is not None:
            raise ValueError(
                f"give size or scale_factor, not both: got size={size!r} and scale_factor={scale_factor!r}"
            )
        if mode not in ("auto", *checks.MODES):
            raise ValueError(f"mode must be one of {('auto', *checks.MODES)}, got {mode!r}")
        if not isinstance(align_corners, bool):
            raise TypeError(f"align_corners must be a bool, got {align_corners!r}")
        if align_corners and mode not in ("auto", "bilinear"):
            raise ValueError(f"align_corners=True is for bilinear resampling only, got mode={mode!r}")
        if norm not in ("batch", None):
            raise ValueError(f"norm must be 'batch' or None, got {norm!r}")
        if activation not in ("relu", None):
            raise ValueError(f"activation must be 'relu' or None, got {activation!r}")
        if gate_bias_init is not None and (
            isinstance(gate_bias_init, bool) or not isinstance(gate_bias_init, (int, float))
        ):
            raise TypeError(f"gate_bias_init must be a number or None, got {gate_bias_init!r}")

        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.scale_factor = None if scale_factor is None else checks.as_scale(scale_factor)
        self.size = None if size is None else checks.as_size(size)
        self.mode = mode
        self.align_corners = align_corners
        self.predictor = None if num_classes is None else nn.Conv2d(in_channels, num_classes, 1)
        self.gate = nn.Conv2d(num_classes or in_channels, 1, 1, bias=gate_bias_init is not None)
        if self.gate.bias is not None:
            nn.init.constant_(self.gate.bias, float(gate_bias_init))  # type: ignore[arg-type]
        projects = self.out_channels != in_channels
        self.projection = nn.Conv2d(in_channels, self.out_channels, 1, bias=norm is None) if projects else None
        self.norm = nn.BatchNorm2d(self.out_channels) if projects and norm == "batch" else None
        self.activation = nn.ReLU(inplace=True) if projects and activation == "relu" else None

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The transferred feature; (output, class_map) in the supervised form. ``size`` overrides the module's own."""
        checks.check_input(x)
        if x.shape[1] != self.in_channels:
            raise ValueError(f"x must have in_channels={self.in_channels} channels, got shape {tuple(x.shape)}")
        scale_factor = self.scale_factor if size is None else None
        size = self.size if size is None else size
        if size is None and scale_factor is None:
            raise ValueError("size must be given to forward: the module was made with neither size nor scale_factor")
        (height, width), _ = checks.output_size(x, size, scale_factor)
        mode = self.mode
        if mode == "auto":
            mode = "avg" if height <= x.shape[2] and width <= x.shape[3] else "bilinear"
        transfer: dict[str, Any] = {
            "size": size,
            "scale_factor": scale_factor,
            "mode": mode,
            "align_corners": self.align_corners and mode == "bilinear",
        }
        gate: tuple[Tensor, Tensor | None] = (self.gate.weight, self.gate.bias)
        if self.predictor is not None:
            gate = collapse_gate(self.predictor.weight, self.predictor.bias, *gate)
        if self.projection is None:
            output = gated_scale_transfer(x, *gate, **transfer)
        else:
            activation: Activation = None if self.activation is None else "relu"
            output = gated_norm_transfer(x, *gate, self.projection, self.norm, activation=activation, **transfer)
        return output if self.predictor is None else (output, self.predictor(x))

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}", f"mode={self.mode!r}"]
        parts += [f"size={self.size}"] if self.size else []
        parts += [f"scale_factor={self.scale_factor}"] if self.scale_factor else []
        parts += ["align_corners=True"] if self.align_corners else []
        return ", ".join(parts)
