"""``gsto_ops::batch_norm_sum``: batch norms, upsampling, sum and ReLU in one pass: the end of a fusion or a residual block.

``output = act(gate ⊙ input + Σ_k ST(norm_k(term_k)))``, where ST resamples term k to the output's size: that of ``input``, or of
the first term. With ``training`` the statistics are those of the batch, computed before (``channel_statistics``, or the
epilogue of ``gated_split``), and the gradient of a term includes what flows through them.

Where a ``carrier`` is given (see ``gated_split``), the gradient of ``gate ⊙ input`` is the carrier's, and ``input`` and ``gate``
have none: ``gated_split``, which reads the input in its own backward pass anyway, does the rest.

The gradient takes two passes, because the second one needs sums over all pixels of the first, which are also the gradients of
bias and weight; across processes (``group``) they are added up in between. Where the ReLU follows a single norm, both passes find
where it was open from the term, which they read anyway: the output is neither kept nor read, and the gradient under the ReLU
neither written nor read (7 -> 5 maps).

``batch_norm_sum_`` is the sum with norms in eval mode, written to the first term of the output's size: for CPUs, where new memory
costs more than the sum (see ``norm_sum``). It records no gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from .. import reference
from .autograd import differentiable_backward
from .library import define, empty_like_layout, layout_of, libraries, operators, register

NORMS = "Tensor[] mean, Tensor[] var, Tensor[] weight"
SCHEMA = (
    f"(Tensor? input, Tensor? gate, Tensor[] terms, {NORMS}, Tensor[] bias, float[] eps, bool training, Tensor? counts, "
    "str? group, str activation, str mode, bool align_corners, Tensor? carrier=None) -> Tensor"
)
IN_PLACE_SCHEMA = (
    f"(Tensor? input, Tensor? gate, Tensor(a!)[] terms, {NORMS}, Tensor[] bias, float[] eps, str activation, str mode, "
    "bool align_corners) -> ()"
)
BACKWARD_SCHEMA = (
    "(Tensor grad_output, Tensor? output, Tensor[] terms, Tensor[] mean, Tensor[] var, float[] eps, str mode, "
    "bool align_corners, Tensor? weight=None, Tensor? bias=None) -> (Tensor grad_sum, Tensor[] gathered, Tensor sums)"
)
MAPS = "Tensor grad_sum, Tensor[] gathered, Tensor[] terms"
BACKWARD_TERMS_SCHEMA = f"({MAPS}, {NORMS}, float[] eps, Tensor? sums, Tensor? counts, Tensor? bias=None) -> Tensor[]"


def _kernel(
    input: Tensor | None,
    gate: Tensor | None,
    terms: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    eps: Sequence[float],
    training: bool,
    counts: Tensor | None,
    group: str | None,
    activation: str,
    mode: str,
    align_corners: bool,
    carrier: Tensor | None = None,
) -> Tensor:
    norms = (mean, var, weight, bias, eps)
    output = reference.batch_norm_sum(input, gate, terms, *norms, activation, mode, align_corners)
    first = terms[0] if input is None else input
    output = output.contiguous(memory_format=layout_of(first))
    return output.clone() if output is first else output


def _formula(*operands: Any) -> Tensor:
    """In forward mode the statistics of the batch, which were made before without tangents, are made again."""
    input, gate, terms, mean, var, weight, bias, eps, training, counts, group, *others = operands
    if training and mean:
        if group is not None:
            raise RuntimeError("batch_norm_sum: no forward mode through statistics of several processes")
        mean, var = zip(*map(reference.channel_statistics, terms), strict=True)
    return _kernel(input, gate, terms, mean, var, weight, bias, eps, training, counts, group, *others)


def _in_place_kernel(input: Tensor | None, gate: Tensor | None, terms: Sequence[Tensor], *others: Any) -> None:
    size = terms[0].shape if input is None else input.shape
    target = next(term for term in terms if term.shape == size)
    target.copy_(reference.batch_norm_sum(input, gate, terms, *others))


def _in_place_fake(*operands: Any) -> None:
    return None


def _fake(input: Tensor | None, gate: Tensor | None, terms: Sequence[Tensor], *others: Any) -> Tensor:
    first = terms[0] if input is None else input
    return empty_like_layout(first, first.shape)


def _backward_kernel(
    grad_output: Tensor,
    output: Tensor | None,
    terms: Sequence[Tensor],
    *others: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    grad, gathered, sums = reference.batch_norm_sum_backward(grad_output, output, terms, *others)
    if output is not None:
        grad = grad.contiguous(memory_format=layout_of(output))
    low = (term for term in terms if term.shape[2:] != grad_output.shape[2:])
    gathered = [g.contiguous(memory_format=layout_of(term)) for g, term in zip(gathered, low, strict=True)]
    return grad, gathered, sums


def _backward_fake(
    grad_output: Tensor,
    output: Tensor | None,
    terms: Sequence[Tensor],
    mean: Sequence[Tensor],
    *others: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    low = [term for term in terms if term.shape[2:] != grad_output.shape[2:]]
    sums = grad_output.new_empty(1 + len(mean), grad_output.shape[1], dtype=reference.statistics_dtype(grad_output))
    grad_sum = grad_output.new_empty(0) if output is None else empty_like_layout(output, output.shape)
    return grad_sum, [empty_like_layout(term, term.shape) for term in low], sums


def _backward_terms_kernel(
    grad_sum: Tensor, gathered: Sequence[Tensor], terms: Sequence[Tensor], *norms: Any
) -> list[Tensor]:
    grads = reference.batch_norm_sum_backward_terms(grad_sum, gathered, terms, *norms)
    return [grad.contiguous(memory_format=layout_of(term)) for grad, term in zip(grads, terms, strict=True)]


def _backward_terms_fake(
    grad_sum: Tensor, gathered: Sequence[Tensor], terms: Sequence[Tensor], *norms: Any
) -> list[Tensor]:
    return [empty_like_layout(term, term.shape) for term in terms]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    (
        input,
        gate,
        terms,
        mean,
        var,
        weight,
        bias,
        ctx.eps,
        ctx.training,
        counts,
        ctx.group,
        ctx.activation,
        mode,
        align_corners,
        *carrier,
    ) = inputs
    ctx.resampling = mode, align_corners
    ctx.options = len(inputs) - 7
    ctx.carried = bool(carrier) and carrier[0] is not None
    if ctx.carried:
        gate = None
    ctx.count = len(terms), len(mean)
    # The output is the input of the next layer, and a term is what a convolution made: no other map is kept, but the input
    # where its gate wants a gradient.
    ctx.single = ctx.activation == "relu" and input is None and len(terms) == len(mean) == 1
    mask = output if ctx.activation == "relu" and not ctx.single else None
    ctx.save_for_backward(input if gate is not None else None, gate, mask, counts, *terms, *mean, *var, *weight, *bias)
    ctx.has_input = input is not None


def _backward(operator: Callable, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    input, gate, output, counts, *saved = ctx.saved_tensors
    n_terms, n_norms = ctx.count
    terms, saved = saved[:n_terms], saved[n_terms:]
    mean, var, weight, bias = (saved[k * n_norms : (k + 1) * n_norms] for k in range(4))
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, grad_output, input, gate, terms, mean, var, weight, bias)
    single = (weight[0], bias[0]) if ctx.single else ()
    grad_sum, gathered, sums = operator(grad_output, output, terms, mean, var, ctx.eps, *ctx.resampling, *single)
    if output is None:
        grad_sum = grad_output
    low = iter(gathered)
    grads = [grad_sum if term.shape[2:] == grad_sum.shape[2:] else next(low) for term in terms]
    grad_bias, *grads_weight = sums.unbind()
    grads_bias = [grad_bias] * n_norms
    if n_norms:
        total = None
        if ctx.training:
            total = sums if ctx.group is None else collectives.all_reduce(sums, "sum", ctx.group)
        grads = _namespace_of(operator).batch_norm_sum_backward_terms(
            grad_sum, gathered, terms, mean, var, weight, ctx.eps, total, counts, bias[0] if ctx.single else None
        )
    grad_input, grad_gate = (grad_sum if ctx.has_input else None), None
    if gate is not None:
        grad_input, grad_gate = gate * grad_sum, (input * grad_sum).sum(1, keepdim=True)
    return _gradients(ctx, grad_input, grad_gate, grads, grads_weight, grads_bias)


def _gradients(
    ctx: Any,
    grad_input: Tensor | None,
    grad_gate: Tensor | None,
    grads: Sequence[Tensor | None],
    grads_weight: Sequence[Tensor | None],
    grads_bias: Sequence[Tensor | None],
) -> tuple[Any, ...]:
    """In the order of the schema, as many as the call had arguments."""
    none: list[Any] = [None] * ctx.count[1]
    others: list[Any] = [None] * ctx.options
    if ctx.carried:
        others[-1], grad_input = grad_input, None
    return grad_input, grad_gate, grads, none, none, grads_weight, grads_bias, *others


def _differentiable_backward(
    ctx: Any,
    grad_output: Tensor,
    input: Tensor | None,
    gate: Tensor | None,
    terms: list[Tensor],
    mean: list[Tensor],
    var: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor],
) -> tuple[Any, ...]:
    if ctx.group is not None:
        raise RuntimeError("batch_norm_sum: no double backward through statistics of several processes")
    n_terms, n_norms = ctx.count
    if ctx.has_input and input is None:  # without a gate its value does not matter where its sum's mask is known
        input = grad_output.new_zeros(()).expand_as(grad_output)
    mask = None if ctx.activation == "none" or ctx.single else ctx.saved_tensors[2] > 0
    if ctx.single:
        norms = (mean, var, weight, bias, ctx.eps)
        with torch.no_grad():
            mask = reference.batch_norm_sum(None, None, terms, *norms, "none", *ctx.resampling) > 0

    def function(*operands: Tensor | None) -> Tensor:
        first, factor, *rest = operands
        maps, gamma, beta = rest[:n_terms], rest[n_terms : n_terms + n_norms], rest[n_terms + n_norms :]
        means, variances = mean, var
        if ctx.training and n_norms:
            statistics = [reference.channel_statistics(x) for x in maps]  # type: ignore[arg-type]
            means, variances = map(list, zip(*statistics, strict=True))
        norms = (means, variances, gamma, beta, ctx.eps)
        total = reference.batch_norm_sum(first, factor, maps, *norms, "none", *ctx.resampling)  # type: ignore[arg-type]
        return total if mask is None else total * mask

    operands = (input, gate, *terms, *weight, *bias)
    needs_grad = [ctx.has_input, gate is not None, *[True] * (n_terms + 2 * n_norms)]
    needs_grad = [needed and o is not None and o.requires_grad for needed, o in zip(needs_grad, operands, strict=True)]
    found = differentiable_backward(function, operands, needs_grad, (grad_output,))
    if ctx.has_input and gate is None:
        found[0] = grad_output if mask is None else grad_output * mask
    maps, gammas, betas = (
        found[2 : 2 + n_terms],
        found[2 + n_terms : 2 + n_terms + n_norms],
        found[2 + n_terms + n_norms :],
    )
    return _gradients(ctx, found[0], found[1], maps, gammas, betas)


def _namespace_of(operator: Any) -> Any:
    """The namespace that an operator belongs to."""
    return getattr(torch.ops, operator.namespace)


define(
    "batch_norm_sum_backward_terms",
    "batch_norm_sum",
    "backward_terms",
    BACKWARD_TERMS_SCHEMA,
    _backward_terms_kernel,
    _backward_terms_fake,
)
# No autocast rule: the maps keep their dtype, and the norms are float32 whatever the maps'.
register(
    "batch_norm_sum",
    SCHEMA,
    _kernel,
    _fake,
    BACKWARD_SCHEMA,
    _backward_kernel,
    _backward_fake,
    _setup_context,
    _backward,
    autocast=False,
    formula=_formula,
)
libraries["gsto_ops"].define(f"batch_norm_sum_{IN_PLACE_SCHEMA}")
libraries["gsto_ops"].impl("batch_norm_sum_", _in_place_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("gsto_ops::batch_norm_sum_", _in_place_fake, lib=libraries["gsto_ops"])
operators["gsto_ops"].batch_norm_sum_ = torch.ops.gsto_ops.batch_norm_sum_.default
