"""The gated exchange between parallel branches (GFM; arXiv 2005.13363, Section 3.2.1): ``gated_split`` and ``gated_fusion``."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import checks, reference
from .functional import Activation, Mode, _operators, _outside_autocast
from .norm_sum import (
    Statistics,
    makes_new_map,
    norm_sum,
    over_processes,
    process_group,
    update_running_statistics,
    uses_batch_statistics,
)
from .ops.gated_split import new_carriers


class Split(NamedTuple):
    """What :func:`gated_split` returns; ``mean`` and ``var`` carry no gradient."""

    projected: list[Tensor]
    gated: list[Tensor]
    gate: Tensor
    mean: Tensor
    var: Tensor


def gated_split(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    split: Sequence[int] = (),
    copies: int = 0,
    carriers: int = 0,
    activation: Activation = None,
) -> Split:
    """K gates of one map, with what they gate, from one read (Eq. 1, 2, 4; Section 3.2.1).

    ``gate_k = σ(act(conv1x1(input)_k))``. The first gates belong to projections, ``projected_k = gate_k * conv1x1(input, W_k)``,
    the next ``copies`` ones to ``gated_k = gate_k * input``. The copies of the next ``carriers`` gates are not written: zeros of
    one element in memory stand for them, through which :func:`norm_sum` returns their gradient. Further gates are only computed.

    Args:
        input: (N, C, H, W), float32, float64, bfloat16 or float16, any strides.
        gate_weight: (K, C, 1, 1). gate_bias: (K,) or None.
        weight: (ΣC_k, C, 1, 1), the projections below each other, or None for none. split: their heights C_k.
        copies, carriers: how many of the other gates make a gated copy, and how many a carrier of its gradient.
        activation: None or ``"relu"``, of the gates' logits (the released form).

    Returns:
        (projected, gated, gate, mean, var): maps (N, C_k, H, W); maps (N, C, H, W), first the copies; (N, K, H, W); mean and
        biased variance of all projected channels (ΣC_k,) in float32 (float64 for float64 input), without gradient:
        :func:`norm_sum` accounts for it.

    Raises:
        ValueError, TypeError: as ``gated_scale_transfer``; a split, copies or carriers that do not fit the weights.
    """
    checks.check_input(input)
    channels = input.shape[1]
    checks.check_parameter(
        "gate_weight", gate_weight, (None, channels, 1, 1), input, meaning="(gates, in_channels, 1, 1)"
    )
    gates = gate_weight.shape[0]
    checks.check_parameter("gate_bias", gate_bias, (gates,), input, meaning="(gates,)")
    checks.check_projection(weight, None, input)
    rows = 0 if weight is None else weight.shape[0]
    if not isinstance(split, (list, tuple)) or not all(isinstance(height, int) and height > 0 for height in split):
        raise ValueError(f"split must be a list of positive ints, got {split!r}")
    if sum(split) != rows:
        raise ValueError(f"split must add up to the {rows} rows of weight, got {tuple(split)}")
    if len(split) > gates:
        raise ValueError(f"split must have at most {gates} heights, one per gate, got {tuple(split)}")
    if not isinstance(copies, int) or not isinstance(carriers, int):
        raise TypeError(f"copies and carriers must be ints, got {copies!r} and {carriers!r}")
    if min(copies, carriers) < 0 or copies + carriers > gates - len(split):
        raise ValueError(
            f"copies and carriers must be 0 to {gates - len(split)} together, {gates} gates less {len(split)} projections, "
            f"got {copies} and {carriers}"
        )
    act = checks.check_activation(activation)
    operands = (gate_weight, gate_bias, weight, list(split), copies, act)
    return Split(*_outside_autocast(_gated_split, input, *operands, carriers))


def _gated_split(input: Tensor, *operands: Any) -> tuple[Any, ...]:
    """The last operand: how many carriers."""
    operators = _operators("gated_split", input)
    if operators is not None:
        return operators.gated_split(input, *operands)
    *operands, carriers = operands  # type: ignore[assignment]
    projected, gated, gate, mean, var = reference.gated_split(input, *operands)
    # Autograd knows the gradient of gate * input: no carrier needs one.
    return projected, gated + new_carriers(input, carriers), gate, mean.detach(), var.detach()


class _GatedConv2d(torch.autograd.Function):
    """The convolution of a gated copy that keeps the map, which others keep too, and makes the copy again for its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        gated: Tensor,
        weight: Tensor,
        options: tuple[Any, ...],
        input: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor | None,
        activation: str,
    ) -> Tensor:
        ctx.save_for_backward(weight, input, gate_weight, gate_bias)
        ctx.options, ctx.activation = options, activation
        return F.conv2d(gated, weight, None, *options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, input, gate_weight, gate_bias = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        _, (gated,), *_ = _gated_split(input, gate_weight, gate_bias, None, [], 1, ctx.activation, 0)
        wanted = (*ctx.needs_input_grad[:2], False)
        grad_gated, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, gated, weight, None, stride, padding, dilation, False, (0, 0), groups, wanted
        )
        return grad_gated, grad_weight, *(None,) * 5


def _gated_conv2d(
    gated: Tensor, conv: nn.Conv2d, input: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, activation: Activation
) -> Tensor:
    if not torch.is_grad_enabled() or conv.bias is not None or isinstance(conv.padding, str):
        return conv(gated)
    options = (conv.stride, conv.padding, conv.dilation, conv.groups)
    weight, *operands = (t if t is None else t.to(gated.dtype) for t in (conv.weight, input, gate_weight, gate_bias))
    return _GatedConv2d.apply(gated, weight, options, *operands, checks.check_activation(activation))


def gated_fusion(
    inputs: Sequence[Tensor],
    transfers: Any,
    gates: Any = None,
    *,
    mode: Mode = "bilinear",
    align_corners: bool = False,
    return_gate: bool = False,
) -> Any:
    """The exchange between parallel branches (Section 3.2.1): ``y_i = ReLU(Σ_j transfer_ij(gate_ij * x_j))``.

    Each branch is read once for all that leaves it (:func:`gated_split`), each output is written in one pass
    (:func:`norm_sum`); in between run the strided convolutions.

    Args:
        inputs: maps (N, C_j, H_j, W_j), highest resolution first.
        transfers: indexed [target i][source j], the layers that bring branch j to branch i: for j > i a 1x1 convolution without
            bias and its norm (then comes the upsampling), for j = i anything (not used), for j < i steps of a convolution and
            its norm, and ReLU after all but the last one. Fewer targets than inputs are legal.
        gates: indexed like ``transfers``, the layers of a gate's logit: a 1x1 convolution C_j -> 1 (the paper's form), or that
            with a batch norm and ReLU behind it (the released form); None: no gates, which is HRNetV2's fusion.
        mode, align_corners: of the upsampling, as in :func:`norm_sum`. return_gate: whether to return the gates, too.

    Returns:
        maps (N, C_i, H_i, W_i), as many as targets. With ``return_gate`` (outputs, gates): the gates (N, 1, H_j, W_j), indexed
        [target][source], detached; no gates: [].

    Raises:
        ValueError, TypeError: as :func:`gated_split` and :func:`norm_sum`; gates of one branch in both modes.
    """
    transfers = [list(row) for row in transfers]  # indexing an nn.ModuleList takes longer than some of the sums
    gates = None if gates is None else [list(row) for row in gates]
    _check_tables(transfers, gates, len(inputs))
    leaving = [_leave(x, j, transfers, gates) for j, x in enumerate(inputs)]
    outputs = []
    for i in range(len(transfers)):
        terms, norms, statistics, inplace = [], [], [], True
        for j in range(len(inputs)):
            if j == i:
                continue
            term, known, conv = leaving[j].terms[i]
            terms.append(term)
            norms.append(transfers[i][j][1] if j > i else transfers[i][j][-1][1])
            statistics.append(known)
            inplace = inplace and makes_new_map(conv)
        own, gate, carrier = leaving[i].own
        outputs.append(
            norm_sum(
                own,
                terms,
                norms,
                gate=gate,
                carrier=carrier,
                statistics=statistics,
                activation="relu",
                mode=mode,
                align_corners=align_corners,
                inplace=inplace,
            )
        )
    if not return_gate:
        return outputs
    if gates is None:
        return outputs, []
    single = [dict(zip(order, gate.detach().split(1, 1), strict=True)) for _, _, order, gate in leaving]
    return outputs, [[single[j][i] for j in range(len(inputs))] for i in range(len(transfers))]


def _check_tables(transfers: list[list[Any]], gates: list[list[Any]] | None, sources: int) -> None:
    for name, table in (("transfers", transfers), ("gates", transfers if gates is None else gates)):
        widths = [len(row) for row in table]
        if not 1 <= len(transfers) <= sources or widths != [sources] * len(transfers):
            raise ValueError(
                f"{name} must have a row for each of 1 to {sources} outputs, and in it a layer for each of {sources} inputs, "
                f"got rows of {widths}"
            )


class _Leaving(NamedTuple):
    """What leaves one branch."""

    terms: dict[
        int, tuple[Tensor, Statistics | None, nn.Module]
    ]  # by target: before its norm, known statistics, convolution
    own: tuple[Tensor | None, Tensor | None, Tensor | None]  # input, gate and carrier of the sum that it has a part in
    order: Sequence[int]  # the targets of the gates
    gate: Tensor  # (N, K, H, W); no gates: the branch itself


def _leave(x: Tensor, j: int, transfers: list[list[Any]], gates: list[list[Any]] | None) -> _Leaving:
    finer = [i for i in range(len(transfers)) if i < j]
    coarser = [i for i in range(len(transfers)) if i > j]
    own = [j] if j < len(transfers) else []
    terms: dict[int, tuple[Tensor, Statistics | None, nn.Module]] = {}
    if gates is None:
        for i in finer:
            conv, _ = transfers[i][j]
            terms[i] = conv(x), None, conv
        for i in coarser:
            first, *others = transfers[i][j]
            terms[i] = _descend(first, others, first[0](x))
        return _Leaving(terms, (x, None, None), (), x)
    order = [*finer, *coarser, *own]
    weight, bias, activation = _gate_operands(x, [gates[i][j] for i in order])
    carried = own if torch.is_grad_enabled() else []  # the sum multiplies by the gate itself: it has no use for a copy
    projections = [transfers[i][j][0].weight for i in finer]
    split = gated_split(
        x,
        weight,
        bias,
        torch.cat(projections) if projections else None,
        split=[p.shape[0] for p in projections],
        copies=len(coarser),
        carriers=len(carried),
        activation=activation,
    )
    row = 0
    for i, projected in zip(finer, split.projected, strict=True):
        conv, norm = transfers[i][j]
        end = row + projected.shape[1]
        known = (split.mean[row:end], split.var[row:end]) if uses_batch_statistics(norm) else None
        terms[i], row = (projected, known, conv), end
    gated = dict(zip([*coarser, *carried], split.gated, strict=True))
    for k, i in enumerate(coarser, len(finer)):
        first, *others = transfers[i][j]
        gate = (weight[k : k + 1], None if bias is None else bias[k : k + 1], activation)
        terms[i] = _descend(first, others, _gated_conv2d(gated[i], first[0], x, *gate))
    mine = (x.to(split.gate.dtype), split.gate[:, -1:], gated.get(j)) if own else (None, None, None)
    return _Leaving(terms, mine, order, split.gate)


def _descend(first: Any, others: Sequence[Any], x: Tensor) -> tuple[Tensor, None, nn.Module]:
    """The chain of strided convolutions from behind the first one: up to the last one's result, before its norm."""
    conv, norm, *_ = first
    for following in others:
        x = norm_sum(None, [x], [norm], activation="relu", inplace=makes_new_map(conv))
        conv, norm, *_ = following
        x = conv(x)
    return x, None, conv


def _gate_operands(x: Tensor, gates: Sequence[Any]) -> tuple[Tensor, Tensor | None, Activation]:
    """Weight (K, C, 1, 1), bias (K,) and activation of the logits; a batch norm behind them is folded, in training mode with
    the statistics of a first look at the logits."""
    weight = torch.cat([layers[0].weight for layers in gates])
    biases = [layers[0].bias for layers in gates]
    bias = None if biases[0] is None else torch.cat(biases)
    if len(gates[0]) == 1:
        return weight, bias, None
    norms = [layers[1] for layers in gates]
    if len({uses_batch_statistics(norm) for norm in norms}) > 1:
        raise ValueError(
            "gates: the batch norms of a branch's gates must all be in training mode or all in eval mode, got both"
        )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    mean, var = _logit_statistics(x, weight, norms, dtype)
    invstd = torch.cat([(v + norm.eps).rsqrt() for v, norm in zip(var.split(1), norms, strict=True)])
    gamma, beta = (torch.cat([getattr(norm, name) for norm in norms]).to(dtype) for name in ("weight", "bias"))
    scale = gamma * invstd
    return (weight * scale[:, None, None, None]).to(weight.dtype), (beta - mean * scale).to(weight.dtype), "relu"


def _moments(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Statistics:
    """Biased variance and mean of the logits."""
    var, mean = torch.var_mean(F.conv2d(x, weight).to(dtype), (0, 2, 3), correction=0)
    return var, mean


def _logit_statistics(x: Tensor, weight: Tensor, norms: Sequence[nn.BatchNorm2d], dtype: torch.dtype) -> Statistics:
    """Mean and variance (K,) that the norms of K logits take; in training mode gradients flow through them."""
    if not uses_batch_statistics(norms[0]):
        running = [
            torch.cat([getattr(norm, f"running_{name}") for norm in norms]).to(dtype) for name in ("mean", "var")
        ]
        return running[0], running[1]
    # The logits are made again for the gradient: one product of x is less than what keeping them, twice, would take.
    if torch.is_grad_enabled():
        var, mean = checkpoint(_moments, x, weight, dtype, use_reentrant=False, preserve_rng_state=False)
    else:
        var, mean = _moments(x, weight, dtype)
    pixels, counts = x.shape[0] * x.shape[2] * x.shape[3], None
    group = process_group(norms[0])
    if group is not None:
        (mean,), (var,), counts = over_processes([mean], [var], [pixels], group)
        counts = counts.expand(len(norms))
    with torch.no_grad():
        operators = _operators("gated_split", x)
        update_running_statistics(operators, norms, mean.split(1), var.split(1), [pixels] * len(norms), counts)
    return mean, var
