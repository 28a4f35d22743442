"""Batch norms, upsampling, sum and ReLU: the end of a fusion or of a residual block."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .parts import activate, statistics_dtype
from .scale_transfer import scale_transfer, scale_transfer_backward


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
    return activate(total, activation)


def batch_norm_sum_backward(
    grad_output: Tensor,
    output: Tensor | None,
    terms: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    eps: Sequence[float],
    mode: str,
    align_corners: bool = False,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The first pass of the gradient of :func:`batch_norm_sum`; ``output`` is None where there was no ReLU.

    With ``weight`` and ``bias`` there was one, behind a single norm: where it was open is found from its term.

    Returns (grad_sum, gathered, sums): the gradient of the sum under the ReLU (no elements without one: it is
    ``grad_output``); its transposed resampling for every term of another size than the output; (1 + K', C) with K' statistics,
    Σ grad_sum and Σ grad_k · (term_k - mean_k) / sqrt(var_k + eps_k) over N, H, W: the gradients of bias and weight.
    """
    grad = grad_output if output is None else grad_output * (output > 0)
    if bias is not None and weight is not None:
        grad = grad_output * _is_open(terms[0], mean[0], var[0], weight, bias, eps[0])
    gathered, sums = [], [grad.to(statistics_dtype(grad)).sum((0, 2, 3))]
    for k, term in enumerate(terms):
        grad_k = grad
        if term.shape[2:] != grad.shape[2:]:
            grad_k = scale_transfer_backward(grad, term.shape, mode, align_corners)
            gathered.append(grad_k)
        if mean:
            sums.append((grad_k * (term - mean[k][:, None, None])).sum((0, 2, 3)) * (var[k] + eps[k]).rsqrt())
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
    bias: Tensor | None = None,
) -> list[Tensor]:
    """The second pass: gradients of :func:`batch_norm_sum` for its terms, those of the batch statistics included.

    ``sums`` is None where the statistics are constants (eval mode). Where they are over several processes, ``sums`` is too, and
    ``counts`` (K,) has the number of pixels of each term in all of them; None: the term's own. With ``bias``, of a single norm
    with ReLU behind it, ``grad_sum`` is the gradient of the output.
    """
    if bias is not None:
        grad_sum = grad_sum * _is_open(terms[0], mean[0], var[0], weight[0], bias, eps[0])
    grads, low = [], iter(gathered)
    for k, term in enumerate(terms):
        grad = grad_sum if term.shape[2:] == grad_sum.shape[2:] else next(low)
        invstd = (var[k] + eps[k]).rsqrt()
        scale = weight[k] * invstd
        if sums is None:
            grads.append((scale[:, None, None] * grad).to(term.dtype))
            continue
        count = term.shape[0] * term.shape[2] * term.shape[3] if counts is None else counts[k]
        slope = sums[1 + k] * invstd / count
        centred = grad - (sums[0] / count)[:, None, None] - slope[:, None, None] * (term - mean[k][:, None, None])
        grads.append((scale[:, None, None] * centred).to(term.dtype))
    return grads


def _is_open(term: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Where the ReLU behind a single norm lets its term through."""
    scale = weight * (var + eps).rsqrt()
    return scale[:, None, None] * term + (bias - mean * scale)[:, None, None] > 0
