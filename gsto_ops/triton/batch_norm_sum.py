"""``batch_norm_sum`` in Triton: one pass forward, two backward; a small term's gradient is gathered in a pass of its own.

Passes over maps, backward:

- all              dy, y, terms of y's size -> dm and the sums     one kernel; of a single norm dy, term -> the sums
- a smaller term   dm, term -> R^T dm and its sums                 one kernel each; dm comes from L2 where it fits (50 MB)
- all              gradient, terms -> the terms' gradients         one kernel for all terms of y's size, one for each other
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import Resampling, new_map, resampling
from .norm import normalised_sum
from .norm_backward import masked_sums, terms_backward
from .resample import resample_transposed

Tensors = Sequence[Tensor]


def _transfer(term: Tensor, size: Sequence[int], mode: str, align_corners: bool) -> Resampling:
    if mode not in ("bilinear", "nearest"):
        raise ValueError(f"batch_norm_sum: mode must be 'bilinear' or 'nearest', got {mode!r}")
    height, width = term.shape[2:]
    return resampling((height, width), (size[0], size[1]), mode, align_corners, None, None)


def forward(
    input: Tensor | None,
    gate: Tensor | None,
    terms: Tensors,
    mean: Tensors,
    var: Tensors,
    weight: Tensors,
    bias: Tensors,
    eps: Sequence[float],
    training: bool,
    counts: Tensor | None,
    group: str | None,
    activation: str,
    mode: str,
    align_corners: bool,
    carrier: Tensor | None = None,
) -> Tensor:
    first = terms[0] if input is None else input
    output = new_map(first, *first.shape[1:])
    norms = [[vector.contiguous() for vector in vectors] for vectors in (mean, var, weight, bias)]
    transfers = [_transfer(term, first.shape[2:], mode, align_corners) for term in terms]
    normalised_sum(input, gate, terms, transfers, norms, eps, output, relu=activation == "relu")
    return output


def backward(
    grad_output: Tensor,
    output: Tensor | None,
    terms: Tensors,
    mean: Tensors,
    var: Tensors,
    eps: Sequence[float],
    mode: str,
    align_corners: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    size, channels = grad_output.shape[2:], grad_output.shape[1]
    mean, var = ([vector.contiguous() for vector in vectors] for vectors in (mean, var))
    sums = torch.empty((1 + len(mean), channels), dtype=torch.float32, device=grad_output.device)
    grad_sum = None if output is None else new_map(output, *output.shape[1:])
    weight, bias = (None if x is None else x.contiguous() for x in (weight, bias))
    masked_sums(grad_output, output, grad_sum, terms if mean else [], (mean, var), eps, sums, weight, bias)
    source = grad_output if grad_sum is None else grad_sum
    gathered = []
    for k, term in enumerate(terms):
        if term.shape[2:] == size:
            continue
        dest = new_map(term, *term.shape[1:])
        transfer = _transfer(term, size, mode, align_corners)
        if mean:
            norm = (mean[k], var[k], eps[k])
            resample_transposed(transfer, source, dest, before=term, norm=norm, outputs=(sums[1 + k],))
        else:
            resample_transposed(transfer, source, dest)
        gathered.append(dest)
    return grad_output.new_empty(0) if grad_sum is None else grad_sum, gathered, sums


def backward_terms(
    grad_sum: Tensor,
    gathered: Tensors,
    terms: Tensors,
    mean: Tensors,
    var: Tensors,
    weight: Tensors,
    eps: Sequence[float],
    sums: Tensor | None,
    counts: Tensor | None,
    bias: Tensor | None = None,
) -> list[Tensor]:
    sums, counts, bias = (None if x is None else x.contiguous() for x in (sums, counts, bias))
    norms = [[vector.contiguous() for vector in vectors] for vectors in (mean, var, weight)]
    grads = [new_map(term, *term.shape[1:]) for term in terms]
    same = [k for k, term in enumerate(terms) if term.shape[2:] == grad_sum.shape[2:]]
    small = [k for k in range(len(terms)) if k not in same]
    groups = [(grad, [k]) for grad, k in zip(gathered, small, strict=True)]
    for grad, members in [(grad_sum, same)] * bool(same) + groups:
        pick = lambda values, members=members: [values[k] for k in members]  # noqa: E731
        terms_backward(grad, pick(terms), [pick(v) for v in norms], pick(eps), sums, counts, members, pick(grads), bias)
    return grads
