"""Batch norm, upsampling, sum and ReLU in one pass: ``norm_sum``, the operator ``batch_norm_sum`` with modules for its norms."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import checks, reference
from .functional import Activation, Mode, _operators, scale_transfer

Statistics = tuple[Tensor, Tensor]  # mean and biased variance of every channel


def norm_sum(
    input: Tensor | None,
    terms: Sequence[Tensor],
    norms: Sequence[nn.Module],
    *,
    gate: Tensor | None = None,
    carrier: Tensor | None = None,
    statistics: Sequence[Statistics | None] | None = None,
    activation: Activation = None,
    mode: Mode = "bilinear",
    align_corners: bool = False,
    inplace: bool = False,
) -> Tensor:
    """``act(gate * input + Σ_k ST(norm_k(term_k)))`` in one pass: normalised maps, upsampled maps and the sum are not written.

    With one term this is batch norm and ReLU, or the end of a residual block; with several, the fusion of HRNet's branches.

    - Batch norms (``nn.BatchNorm2d``, ``nn.SyncBatchNorm``), all of them in training mode or all in eval mode, or
      ``nn.Identity`` for all terms: one operator. Running statistics are updated as by the modules.
    - Any other norm: the modules run one after the other.

    Args:
        input: (N, C, H, W), or None. terms: maps (N, C, H_k, W_k), resampled to the size of ``input``, or of the first term.
        norms: a module for every term.
        gate: (N, 1, H, W), or None. carrier: what the gradient of ``gate * input`` goes to instead of these two, from
            :func:`gated_split` of this input, or None.
        statistics: for every term None, or what is known of it already (training mode only).
        activation: None or ``"relu"``. mode: ``"bilinear"`` or ``"nearest"``. align_corners: as in ``F.interpolate``.
        inplace: the terms are not used any more, so that the result may be written over one of them. It is on CPUs, with norms
            in eval mode and gradients switched off: new memory costs there more than the sum.

    Returns:
        (N, C, H, W) in the dtype of the terms.

    Raises:
        ValueError, TypeError: maps, norms or statistics that do not fit each other; a batch norm in training mode with one value
        per channel.
    """
    first = _check_maps(input, terms, norms, gate, carrier)
    if statistics is not None:
        _check_statistics(statistics, terms)
    _check_mode(mode, align_corners)
    act = checks.check_activation(activation)
    operators = _operators("batch_norm_sum", first)
    kind = _kind(norms[0])
    if operators is None or kind is None or any(_kind(norm) != kind for norm in norms[1:]):
        return _plain_norm_sum(input, terms, norms, gate, act, mode, align_corners)
    dtype = terms[0].dtype
    if input is not None and input.dtype != dtype:
        input = input.to(dtype)  # the first block under autocast: the image's dtype meets a convolution's
    arguments: tuple[Any, ...] = ([], [], [], [], [])
    others: tuple[Any, ...] = (False, None, None)
    if kind is not nn.Identity:
        batch_norms, (training, group) = cast(Sequence[nn.BatchNorm2d], norms), kind
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight, bias = [_as(norm.weight, wide) for norm in batch_norms], [_as(norm.bias, wide) for norm in batch_norms]
        eps = [norm.eps for norm in batch_norms]
        if training:
            known = statistics or [None] * len(terms)
            mean, var, counts = _batch_statistics(terms, batch_norms, known, group, operators)
            others = (True, counts, None if group is None else group.group_name)
            inplace = False
        else:
            mean = [_as(cast(Tensor, norm.running_mean), wide) for norm in batch_norms]
            var = [_as(cast(Tensor, norm.running_var), wide) for norm in batch_norms]
        arguments = (mean, var, weight, bias, eps)
    output = _to_write_over(first, terms) if inplace else None
    if output is not None:
        operators.batch_norm_sum_(input, gate, terms, *arguments, act, mode, align_corners)
        return output
    operands = (input, gate, list(terms), *arguments, *others, act, mode, align_corners)
    # Without a gradient of its own, as from another backend's split, a carrier would take the gradient to nowhere.
    if carrier is None or not carrier.requires_grad:
        return operators.batch_norm_sum(*operands)
    return operators.batch_norm_sum(*operands, carrier)


def makes_new_map(layer: nn.Module) -> bool:
    """Whether this is a convolution whose result nobody else has seen, which ``norm_sum`` may write over."""
    return type(layer) is nn.Conv2d and not layer._forward_hooks


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _to_write_over(first: Tensor, terms: Sequence[Tensor]) -> Tensor | None:
    """The term that takes the result of ``batch_norm_sum_``, if it may: in eager PyTorch on CPUs, without gradients."""
    if (
        not first.is_cpu
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return None
    return next((term for term in terms if term is first or term.shape == first.shape), None)


def _check_maps(
    input: Tensor | None,
    terms: Sequence[Tensor],
    norms: Sequence[nn.Module],
    gate: Tensor | None,
    carrier: Tensor | None,
) -> Tensor:
    if not isinstance(terms, (list, tuple)) or not isinstance(norms, (list, tuple, nn.ModuleList)):
        raise TypeError(
            f"terms must be a list of maps and norms a list of modules, got {type(terms).__name__} and {type(norms).__name__}"
        )
    if not terms or len(norms) != len(terms):
        raise ValueError(
            f"terms must be at least one map, and norms as many modules, got {len(terms)} and {len(norms)}"
        )
    first = terms[0] if input is None else input
    checks.check_input(first)
    for k, term in enumerate(terms):
        if term is first:
            continue
        if not isinstance(term, Tensor):
            raise TypeError(f"terms[{k}] must be a torch.Tensor, got {type(term).__name__}")
        if term.device != first.device:
            raise ValueError(f"terms[{k}] must be on the device of the first map, {first.device}, got {term.device}")
        if term.dim() != 4 or term.shape[:2] != first.shape[:2] or term.dtype != terms[0].dtype:
            raise ValueError(
                f"terms[{k}] must be (N, C, H_k, W_k) = ({first.shape[0]}, {first.shape[1]}, any, any) of {terms[0].dtype}, "
                f"got {tuple(term.shape)} of {term.dtype}"
            )
    channels = first.shape[1]
    for k, norm in enumerate(norms):
        if not isinstance(norm, nn.Module):
            raise TypeError(f"norms[{k}] must be a torch.nn.Module, got {type(norm).__name__}")
        if norm.__dict__.get("num_features", channels) != channels:  # a batch norm's
            raise ValueError(f"norms[{k}] must have {channels} channels as the maps, got {norm.num_features}")
    if gate is not None:
        if input is None:
            raise ValueError("gate must be None where input is None")
        size = (input.shape[0], 1, *input.shape[2:])
        checks.check_parameter("gate", gate, size, input, meaning="one value per pixel")
    if carrier is not None and (gate is None or carrier.shape != first.shape):
        given = "no gate" if gate is None else f"a gate and input of shape {tuple(first.shape)}"
        raise ValueError(f"carrier must have the shape of an input with a gate, got {tuple(carrier.shape)} for {given}")
    return first


def _check_mode(mode: str, align_corners: bool) -> None:
    if mode not in ("bilinear", "nearest"):
        raise ValueError(f"mode must be 'bilinear' or 'nearest', got {mode!r}")
    checks.check_mode(mode, align_corners)


def _check_statistics(statistics: Sequence[Statistics | None], terms: Sequence[Tensor]) -> None:
    if len(statistics) != len(terms):
        raise ValueError(f"statistics must be None or one entry for each of {len(terms)} terms, got {len(statistics)}")
    shape = terms[0].shape[1:2]
    for k, known in enumerate(statistics):
        if known is not None and (known[0].shape != shape or known[1].shape != shape):
            raise ValueError(
                f"statistics[{k}] must be mean and variance of shape {tuple(shape)}, got {[tuple(t.shape) for t in known]}"
            )


def _kind(norm: nn.Module) -> Any:
    """What norms that one operator takes together must have in common; None: this one runs by itself."""
    if type(norm) is nn.Identity:
        return nn.Identity
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm) or norm.weight is None or norm.bias is None:
        return None
    return uses_batch_statistics(norm), process_group(norm)


def uses_batch_statistics(norm: nn.Module) -> bool:
    return norm.training or norm.running_mean is None or norm.running_var is None


def _batch_statistics(
    terms: Sequence[Tensor],
    norms: Sequence[nn.BatchNorm2d],
    statistics: Sequence[Statistics | None],
    group: Any,
    operators: Any,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Mean and variance of every term, over all processes of a group, whose numbers of pixels come third."""
    with torch.no_grad():
        known = [operators.channel_statistics(t) if s is None else s for t, s in zip(terms, statistics, strict=True)]
        mean, var = [m for m, _ in known], [v for _, v in known]
        pixels = [term.shape[0] * term.shape[2] * term.shape[3] for term in terms]
        counts = None
        if group is not None:
            mean, var, counts = over_processes(mean, var, pixels, group)
        elif min(pixels) < 2:
            raise ValueError(
                f"batch norm in training mode needs more than one value per channel, got {[tuple(t.shape) for t in terms]}"
            )
        update_running_statistics(operators, norms, mean, var, pixels, counts)
    return mean, var, counts


def process_group(norm: nn.Module) -> Any:
    """The processes whose batches a norm takes together; None: only its own."""
    if (
        not isinstance(norm, nn.SyncBatchNorm)
        or not norm.training
        or not dist.is_available()
        or not dist.is_initialized()
    ):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class _AllReduce(torch.autograd.Function):
    """The sum over all processes of a group; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return collectives.all_reduce(input, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return collectives.all_reduce(grad, "sum", ctx.group), None


def over_processes(
    mean: Sequence[Tensor], var: Sequence[Tensor], pixels: Sequence[int], group: Any
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Mean and variance over all processes, from those of each (Chan, Golub, LeVeque), and the numbers of pixels (K,)."""
    own = torch.stack([torch.cat([m, v, m.new_full((1,), n)]) for m, v, n in zip(mean, var, pixels, strict=True)])
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    padded = F.pad(own.flatten(), (rank * own.numel(), (ranks - 1 - rank) * own.numel()))
    everyone = _AllReduce.apply(padded, group).view(ranks, *own.shape)  # each process' row, (ranks, K, 2C + 1)
    channels = mean[0].shape[0]
    means, variances, counts = everyone.split([channels, channels, 1], 2)
    total = counts.sum(0)
    share = counts / total
    joint = (share * means).sum(0)
    variance = (share * (variances + (means - joint).square())).sum(0)
    return list(joint.unbind()), list(variance.unbind()), total[:, 0]


def update_running_statistics(
    operators: Any,
    norms: Sequence[nn.BatchNorm2d],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    pixels: Sequence[int],
    counts: Tensor | None = None,
) -> None:
    """What the modules do in training mode: one operator for all that have the same momentum.

    ``operators``: see ``_operators``. ``var`` is biased, over ``pixels`` or, of several processes, over ``counts`` (K,).
    """
    numbers = None if counts is None else counts.unbind()
    rows: dict[float | None, list[tuple[Any, ...]]] = {}
    for k, norm in enumerate(norms):
        buffers = norm._buffers  # as attributes of the module they take 0.4 us each
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
        batches = buffers["num_batches_tracked"]
        if not norm.training or not norm.track_running_stats:
            continue
        if running_mean is None or running_var is None or batches is None:
            continue
        row = (running_mean, running_var, batches, mean[k], var[k], pixels[k])
        rows.setdefault(norm.momentum, []).append(row if numbers is None else (*row, numbers[k]))
    if operators is None or torch.jit.is_tracing():  # where sizes are tensors
        operators = reference
    for momentum, chosen in rows.items():
        columns = [list(column) for column in zip(*chosen, strict=True)]
        if numbers is None:
            columns.append([])
        operators.update_running_statistics_(*columns, momentum)


def _plain_norm_sum(
    input: Tensor | None,
    terms: Sequence[Tensor],
    norms: Sequence[nn.Module],
    gate: Tensor | None,
    activation: str,
    mode: Mode,
    align_corners: bool,
) -> Tensor:
    first = terms[0] if input is None else input
    size = (first.shape[2], first.shape[3])
    parts = [] if input is None else [input if gate is None else gate * input]
    for term, norm in zip(terms, norms, strict=True):
        parts.append(scale_transfer(norm(term), size=size, mode=mode, align_corners=align_corners))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return torch.relu(total) if activation == "relu" else total


def projected_sum(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mode: Mode = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """A 1x1 convolution over maps that are upsampled to the first one's size and concatenated, without doing either.

    ``W concat_j(up(F_j)) = Σ_j up(W_j F_j)``: every map is projected at its own resolution.

    Args:
        inputs: maps (N, C_j, H_j, W_j). weight: (C', ΣC_j, 1, 1). bias: (C',) or None.
        mode: ``"bilinear"`` or ``"nearest"``. align_corners: as in ``F.interpolate``.

    Returns:
        (N, C', H_0, W_0).

    Raises:
        ValueError, TypeError: as :func:`norm_sum`; a weight that does not fit the inputs.
    """
    if not isinstance(inputs, (list, tuple)):
        raise TypeError(f"inputs must be a list of maps, got {type(inputs).__name__}")
    if not inputs:
        raise ValueError("inputs must be at least one map, got none")
    for j, x in enumerate(inputs):
        checks.check_input(x, f"inputs[{j}]")
        if x.shape[0] != inputs[0].shape[0]:
            raise ValueError(f"inputs must have the same N, got shapes {[tuple(x.shape) for x in inputs]}")
    _check_mode(mode, align_corners)
    if weight is None:
        raise TypeError("weight must be a torch.Tensor, got None")
    widths = [x.shape[1] for x in inputs]
    meaning = f"for inputs of {widths} channels"
    for x in inputs:
        checks.check_parameter("weight", weight, (None, sum(widths), 1, 1), x, meaning=meaning)
        checks.check_parameter("bias", bias, (weight.shape[0],), x, meaning="(out_channels,)")
    blocks = weight.split(widths, 1)
    last = len(inputs) - 1  # upsampling keeps constants: the bias joins where there are the fewest pixels
    first, *others = (
        F.conv2d(x, block, bias if j == last else None) for j, (x, block) in enumerate(zip(inputs, blocks, strict=True))
    )
    if not others:
        return first
    return norm_sum(first, others, [nn.Identity()] * len(others), mode=mode, align_corners=align_corners)
