"""The operators in plain PyTorch (Equations 1-6 of the paper): the oracle of the tests, and what runs where no kernel is built.

These functions trust their arguments; ``gsto_ops.functional`` checks them. The explicit ``*_backward`` functions are the default
kernels of the backward operators; the forward functions are differentiable as they are.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
# The scale factors (of H, of W) that the caller gave, if any: like F.interpolate, bilinear and nearest resampling then step by
# 1 / scale factor and not by the ratio of the sizes.
ScaleFactors = tuple[float, float] | None


def scale_transfer(
    input: Tensor, size: tuple[int, int], mode: str, align_corners: bool = False, scale_factors: ScaleFactors = None
) -> Tensor:
    """ST of Eq. 3: resample (N, C, H, W) to (N, C, *size)."""
    if tuple(input.shape[-2:]) == tuple(size) and scale_factors in (None, (1.0, 1.0)):
        return input
    scale_h, scale_w = scale_factors or (None, None)
    if mode == "avg":
        return adaptive_pool(input, size)
    if mode == "bilinear":
        return aten.upsample_bilinear2d(input, size, align_corners, scale_h, scale_w)
    return aten.upsample_nearest2d(input, size, scale_h, scale_w)


def adaptive_pool(input: Tensor, size: tuple[int, int]) -> Tensor:
    """``F.adaptive_avg_pool2d``, in a form whose windows follow the input's size in an exported program too.

    ONNX has no adaptive pooling: converters freeze the windows that the example's size gives.
    """
    lengths = (*input.shape[-2:], *size)
    if not torch.compiler.is_exporting() or not any(isinstance(length, torch.SymInt) for length in lengths):
        return F.adaptive_avg_pool2d(input, size)
    rows, cols = (_pooling(i, o, input) for i, o in zip(input.shape[-2:], size, strict=True))
    return rows @ (input @ cols.mT)


def _pooling(inputs: int, outputs: int, like: Tensor) -> Tensor:
    """Adaptive pooling along one axis as a matrix (outputs, inputs)."""
    o, i = (torch.arange(count, device=like.device)[:, None] for count in (outputs, inputs))
    start, end = o * inputs // outputs, ((o + 1) * inputs + outputs - 1) // outputs
    inside = (i.mT >= start) & (i.mT < end)
    return inside.to(like.dtype) / (end - start).to(like.dtype)


def scale_transfer_backward(
    grad_output: Tensor,
    input_shape: Sequence[int],
    mode: str,
    align_corners: bool = False,
    scale_factors: ScaleFactors = None,
) -> Tensor:
    """Transpose of :func:`scale_transfer`: (N, C, H', W') to (N, C, H, W)."""
    size = tuple(grad_output.shape[-2:])
    shape = (*grad_output.shape[:2], *input_shape[-2:])
    if size == tuple(input_shape[-2:]) and scale_factors in (None, (1.0, 1.0)):
        return grad_output
    scale_h, scale_w = scale_factors or (None, None)
    if mode == "avg":
        return aten._adaptive_avg_pool2d_backward(grad_output, grad_output.new_empty(()).expand(shape))
    if mode == "bilinear":
        return aten.upsample_bilinear2d_backward(grad_output, size, shape, align_corners, scale_h, scale_w)
    return aten.upsample_nearest2d_backward(grad_output, size, shape, scale_h, scale_w)


def _activate(x: Tensor, activation: str) -> Tensor:
    return x.relu() if activation == "relu" else x


def _gate_backward(
    grad: Tensor, grad_gate: Tensor | None, input: Tensor, gate: Tensor, gate_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``gate ⊙ input`` and of the gate for input, gate_weight and gate_bias; ``grad`` is that of the product."""
    grad_of_gate = (grad * input).sum(1, keepdim=True)
    if grad_gate is not None:
        grad_of_gate = grad_of_gate + grad_gate
    grad_logit = grad_of_gate * gate * (1 - gate)
    grad_input = gate * grad + gate_weight * grad_logit
    grad_gate_weight = (grad_logit * input).sum((0, 2, 3))[None, :, None, None]
    return grad_input, grad_gate_weight, grad_logit.sum((0, 1, 2, 3)).reshape(1)


def _projection_backward(grad: Tensor, gated: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a 1x1 convolution without bias for its input and its weight."""
    grad_weight = torch.einsum("nohw,nchw->oc", grad, gated)[:, :, None, None]
    return torch.einsum("nohw,oc->nchw", grad, weight[:, :, 0, 0]), grad_weight


def gated_scale_transfer(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    size: tuple[int, int],
    mode: str,
    align_corners: bool = False,
    scale_factors: ScaleFactors = None,
) -> tuple[Tensor, Tensor]:
    """Unsupervised GSTO (Eq. 1-3): gate = σ(ρ·F + b), ST(act(W(gate ⊙ F) + bias)). Returns (output, gate)."""
    gate = F.conv2d(input, gate_weight, gate_bias).sigmoid()
    output = gate * input
    if weight is not None:
        output = F.conv2d(output, weight, bias)
    return scale_transfer(_activate(output, activation), size, mode, align_corners, scale_factors), gate


def gated_scale_transfer_backward(
    grad_output: Tensor,
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    mode: str,
    align_corners: bool = False,
    scale_factors: ScaleFactors = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`gated_scale_transfer` for input, gate_weight, gate_bias, weight and bias.

    Needs only the input and the gate from the forward pass. The gradients of an absent weight and bias have no elements.
    """
    grad = scale_transfer_backward(grad_output, input.shape, mode, align_corners, scale_factors)
    gated = gate * input
    if activation == "relu":
        grad = grad * ((gated if weight is None else F.conv2d(gated, weight, bias)) > 0)
    grad_weight, grad_bias = input.new_empty(0), input.new_empty(0)
    if weight is not None:
        grad_bias = grad.sum((0, 2, 3))
        grad, grad_weight = _projection_backward(grad, gated, weight)
    return *_gate_backward(grad, grad_gate, input, gate, gate_weight), grad_weight, grad_bias


def supervised_gated_scale_transfer(
    input: Tensor,
    class_weight: Tensor,
    class_bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    size: tuple[int, int],
    mode: str,
    align_corners: bool = False,
    scale_factors: ScaleFactors = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Supervised GSTO (Eq. 4-6): P = W_cls F + b_c, gate = σ(θ·P + b), then as above. Returns (output, class_map, gate)."""
    class_map = F.conv2d(input, class_weight, class_bias)
    gate = F.conv2d(class_map, gate_weight, gate_bias).sigmoid()
    output = gate * input
    if weight is not None:
        output = F.conv2d(output, weight, bias)
    output = scale_transfer(_activate(output, activation), size, mode, align_corners, scale_factors)
    return output, class_map, gate


def statistics_dtype(input: Tensor) -> torch.dtype:
    """Batch statistics are float32, whatever the map's dtype; float64 for float64."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def gated_projection(
    input: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z = W(gate ⊙ F) at the input's size (Eq. 1, 2) and its statistics: (z, gate, mean, biased variance over N, H, W)."""
    gate = F.conv2d(input, gate_weight, gate_bias).sigmoid()
    output = F.conv2d(gate * input, weight)
    var, mean = torch.var_mean(output.to(statistics_dtype(input)), (0, 2, 3), correction=0)
    return output, gate, mean, var


def gated_projection_backward(
    grad_output: Tensor,
    grad_gate: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    weight: Tensor,
    output: Tensor,
    mean: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`gated_projection` for input, gate_weight, gate_bias and weight."""
    grad = grad_output.to(mean.dtype)
    count = output.shape[0] * output.shape[2] * output.shape[3]
    if grad_mean is not None:
        grad = grad + (grad_mean / count)[:, None, None]
    if grad_var is not None:
        grad = grad + (2 / count * grad_var)[:, None, None] * (output - mean[:, None, None])
    grad, grad_weight = _projection_backward(grad.to(input.dtype), gate * input, weight)
    return *_gate_backward(grad, grad_gate, input, gate, gate_weight), grad_weight


def affine_scale_transfer(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str,
    size: tuple[int, int],
    mode: str,
    align_corners: bool = False,
    scale_factors: ScaleFactors = None,
) -> Tensor:
    """ST(act(scale_c · x + shift_c)): batch norm's affine, activation and resampling."""
    output = (scale[:, None, None] * input + shift[:, None, None]).to(input.dtype)
    return scale_transfer(_activate(output, activation), size, mode, align_corners, scale_factors)


def affine_scale_transfer_backward(
    grad_output: Tensor,
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str,
    mode: str,
    align_corners: bool = False,
    scale_factors: ScaleFactors = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`affine_scale_transfer` for input, scale and shift."""
    grad = scale_transfer_backward(grad_output, input.shape, mode, align_corners, scale_factors).to(scale.dtype)
    if activation == "relu":
        grad = grad * (scale[:, None, None] * input + shift[:, None, None] > 0)
    return (scale[:, None, None] * grad).to(input.dtype), (grad * input).sum((0, 2, 3)), grad.sum((0, 2, 3))


def gated_pyramid_pool(
    input: Tensor, gate_weight: Tensor, gate_bias: Tensor | None, bins: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gates of all bins and the pooled maps of ``gate_k ⊙ F`` (Section 3.3, Fig. 4).

    Returns (pooled, gate): (N, C, Σ b²), bin after bin, each flattened; (N, K, H, W).
    """
    gate = F.conv2d(input, gate_weight, gate_bias).sigmoid()
    pooled = [adaptive_pool(gate[:, k : k + 1] * input, (b, b)).flatten(2) for k, b in enumerate(bins)]
    return torch.cat(pooled, 2), gate


def gated_pyramid_pool_backward(
    grad_pooled: Tensor,
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    bins: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`gated_pyramid_pool` for input, gate_weight and gate_bias."""
    grad_input = torch.zeros_like(input)
    grads_weight, grads_bias = [], []
    grads_pooled = grad_pooled.split([b * b for b in bins], 2)
    for k, b in enumerate(bins):
        grad = scale_transfer_backward(grads_pooled[k].unflatten(2, (b, b)), input.shape, "avg")
        gate_k, weight_k = gate[:, k : k + 1], gate_weight[k : k + 1]
        grad_k, grad_weight, grad_bias = _gate_backward(
            grad, None if grad_gate is None else grad_gate[:, k : k + 1], input, gate_k, weight_k
        )
        grad_input = grad_input + grad_k
        grads_weight.append(grad_weight)
        grads_bias.append(grad_bias)
    return grad_input, torch.cat(grads_weight), torch.cat(grads_bias)


def channel_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, biased variance) of every channel over N, H, W."""
    var, mean = torch.var_mean(input.to(statistics_dtype(input)), (0, 2, 3), correction=0)
    return mean, var


def gated_split(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor | None,
    weight: Tensor | None,
    split: Sequence[int],
    copies: int,
    activation: str,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    """All that leaves one branch of a gated fusion (Eq. 4, Section 3.2.1): K gates, the first ones for projections.

    Returns (projected, gated, gate, mean, var): z_k = W_k(gate_k ⊙ F) for the row groups ``split`` of W; gate_k ⊙ F for the
    next ``copies`` gates (further gates are only computed); (N, K, H, W); the statistics of all channels of the z_k.
    """
    gate = _activate(F.conv2d(input, gate_weight, gate_bias), activation).sigmoid()
    gates = gate.split(1, 1)
    gated = [g * input for g in gates[len(split) : len(split) + copies]]
    if weight is None:
        empty = input.new_empty(0, dtype=statistics_dtype(input))
        return [], gated, gate, empty, empty.clone()
    rows = F.conv2d(input, weight).split(list(split), 1)
    projected = [g * z for g, z in zip(gates, rows, strict=False)]
    mean, var = (torch.cat(values) for values in zip(*map(channel_statistics, projected), strict=True))
    return projected, gated, gate, mean, var


def gated_split_backward(
    grad_projected: Sequence[Tensor],
    grad_gated: Sequence[Tensor],
    grad_gate: Tensor | None,
    input: Tensor,
    gate: Tensor,
    gate_weight: Tensor,
    weight: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`gated_split` for input, gate_weight, gate_bias and weight (of an absent one: no elements)."""
    gates = gate.split(1, 1)
    grads_weight = []
    grads = list(grad_gated)  # of gate_k ⊙ F
    if weight is not None:
        blocks = weight.split([grad.shape[1] for grad in grad_projected])
        pairs = [_projection_backward(g, k * input, w) for g, k, w in zip(grad_projected, gates, blocks, strict=False)]
        grads = [grad for grad, _ in pairs] + grads
        grads_weight = [grad for _, grad in pairs]
    grad_of_gate = torch.zeros_like(gate)
    for k, grad in enumerate(grads):
        grad_of_gate[:, k : k + 1] = (grad * input).sum(1, keepdim=True)
    if grad_gate is not None:
        grad_of_gate = grad_of_gate + grad_gate
    grad_logit = grad_of_gate * gate * (1 - gate)
    if activation == "relu":
        grad_logit = grad_logit * (gate > 0.5)  # σ(ReLU(logit)) is 0.5 where the ReLU is closed
    grad_input = torch.einsum("nkhw,kc->nchw", grad_logit, gate_weight[:, :, 0, 0])
    for g, grad in zip(gates, grads, strict=False):
        grad_input = grad_input + g * grad
    grad_gate_weight = torch.einsum("nkhw,nchw->kc", grad_logit, input)[:, :, None, None]
    grad_weight = torch.cat(grads_weight) if grads_weight else input.new_empty(0)
    return grad_input, grad_gate_weight, grad_logit.sum((0, 2, 3)), grad_weight


def batch_norm_sum(
    input: Tensor | None,
    gate: Tensor | None,
    terms: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    eps: Sequence[float],
    activation: str,
    mode: str,
    align_corners: bool = False,
) -> Tensor:
    """act(gate ⊙ input + Σ_k ST(norm_k(term_k))): the end of HRNet's fusion and of a residual block.

    Without statistics (empty lists) the terms are taken as they are.
    """
    first = terms[0] if input is None else input
    parts = [] if input is None else [input if gate is None else gate * input]
    for k, term in enumerate(terms):
        if mean:
            scale = weight[k] * (var[k] + eps[k]).rsqrt()
            shift = bias[k] - mean[k] * scale
            term = (scale[:, None, None] * term + shift[:, None, None]).to(term.dtype)
        parts.append(scale_transfer(term, (first.shape[2], first.shape[3]), mode, align_corners))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return _activate(total, activation)


def batch_norm_sum_backward(
    grad_output: Tensor,
    output: Tensor | None,
    terms: Sequence[Tensor],
    mean: Sequence[Tensor],
    mode: str,
    align_corners: bool = False,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The first pass of the gradient of :func:`batch_norm_sum`; ``output`` is None where there was no ReLU.

    Returns (grad_sum, gathered, sums): the gradient of the sum under the ReLU (no elements without one: it is
    ``grad_output``); its transposed resampling for every term of another size than the output; (1 + K', C) with K' statistics,
    Σ grad_sum and Σ grad_k · (term_k - mean_k) over N, H, W.
    """
    grad = grad_output if output is None else grad_output * (output > 0)
    gathered, sums = [], [grad.to(statistics_dtype(grad)).sum((0, 2, 3))]
    for k, term in enumerate(terms):
        grad_k = grad
        if term.shape[2:] != grad.shape[2:]:
            grad_k = scale_transfer_backward(grad, term.shape, mode, align_corners)
            gathered.append(grad_k)
        if mean:
            sums.append((grad_k * (term - mean[k][:, None, None])).sum((0, 2, 3)))
    return grad.new_empty(0) if output is None else grad, gathered, torch.stack(sums)


def batch_norm_sum_backward_terms(
    grad_sum: Tensor,
    gathered: Sequence[Tensor],
    terms: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    weight: Sequence[Tensor],
    eps: Sequence[float],
    sums: Tensor | None,
    counts: Tensor | None,
) -> list[Tensor]:
    """The second pass: gradients of :func:`batch_norm_sum` for its terms, those of the batch statistics included.

    ``sums`` is None where the statistics are constants (eval mode). Where they are over several processes, ``sums`` is too, and
    ``counts`` (K,) has the number of pixels of each term in all of them; None: the term's own.
    """
    grads, low = [], iter(gathered)
    for k, term in enumerate(terms):
        grad = grad_sum if term.shape[2:] == grad_sum.shape[2:] else next(low)
        invstd = (var[k] + eps[k]).rsqrt()
        scale = weight[k] * invstd
        if sums is None:
            grads.append((scale[:, None, None] * grad).to(term.dtype))
            continue
        count = term.shape[0] * term.shape[2] * term.shape[3] if counts is None else counts[k]
        slope = sums[1 + k] * invstd * invstd / count
        centred = grad - (sums[0] / count)[:, None, None] - slope[:, None, None] * (term - mean[k][:, None, None])
        grads.append((scale[:, None, None] * centred).to(term.dtype))
    return grads


def upsample_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, align_corners: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of logits (N, C, h, w), upsampled to the labels' size, with labels (N, H, W) (Section 4.1).

    Returns (loss, logsumexp, mass): the loss () or (N, H, W), the log-sum-exp of the upsampled logits (N, H, W), and for
    "mean" the summed class weights of the labelled pixels (), by which the sum is divided (no elements otherwise).
    """
    logits = scale_transfer(
        input.to(statistics_dtype(input)), (target.shape[1], target.shape[2]), "bilinear", align_corners
    )
    label = target.long()
    loss = F.cross_entropy(logits, label, weight, ignore_index=ignore_index, reduction="none")
    mass = loss.new_empty(0)
    if reduction == "mean":
        mass = _pixel_weights(label, weight, ignore_index, loss.dtype).sum()
        loss = loss.sum() / _divisor(mass)
    elif reduction == "sum":
        loss = loss.sum()
    return loss, logits.detach().logsumexp(1), mass


def _pixel_weights(label: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """The class weight of each pixel's label, 0 where the pixel is ignored."""
    labelled = label != ignore_index
    if weight is None:
        return labelled.to(dtype)
    return weight[label.where(labelled, 0)].where(labelled, 0)


def _divisor(mass: Tensor) -> Tensor:
    """What "mean" divides by: without a labelled pixel 1, so that the loss is 0 and not 0 / 0."""
    return mass.where(mass != 0, 1)


def upsample_cross_entropy_backward(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    logsumexp: Tensor,
    mass: Tensor,
    ignore_index: int,
    reduction: str,
    align_corners: bool = False,
) -> Tensor:
    """Gradient of :func:`upsample_cross_entropy` for input; grad_loss is () or, for "none", (N, H, W)."""
    logits = scale_transfer(input.to(logsumexp.dtype), (target.shape[1], target.shape[2]), "bilinear", align_corners)
    label = target.long()
    if reduction == "mean":
        grad_loss = grad_loss / _divisor(mass)
    factor = (grad_loss * _pixel_weights(label, weight, ignore_index, logsumexp.dtype))[:, None]
    grad = (logits - logsumexp[:, None]).exp() * factor
    grad = grad.scatter_add(1, label.where(label != ignore_index, 0)[:, None], -factor)
    return scale_transfer_backward(grad, input.shape, "bilinear", align_corners).to(input.dtype)
