"""gated_split, batch_norm_sum and channel_statistics as the dispatcher sees them: opcheck, gradients, double backward."""

import pytest
import torch

import gsto_ops  # noqa: F401  (defines the operators)

OPS = torch.ops.gsto_ops
NCHW, NHWC = torch.contiguous_format, torch.channels_last
FORWARD = ("test_schema", "test_faketensor")


def make(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def statistics(terms):
    pairs = [OPS.channel_statistics(term.detach()) for term in terms]
    return [mean for mean, _ in pairs], [var for _, var in pairs]


def norm_arguments(terms, norms, training):
    """mean, var, weight, bias, eps, training, counts, group of ``batch_norm_sum``."""
    if norms is None:
        return [], [], [], [], [], False, None, None
    half = len(norms) // 2
    if training:
        mean, var = statistics(terms)
    else:
        mean, var = ([torch.full_like(g.detach(), value) for g in norms[:half]] for value in (0.1, 2.0))
    return mean, var, list(norms[:half]), list(norms[half:]), [1e-5, 1e-3][:half], training, None, None


# (row groups, gated copies) of four gates
SPLITS = {"both": ([2, 3], 2), "copies": ([], 3), "projections": ([1, 1, 2, 3], 0)}


def split_operands(case, dtype=torch.float64, memory_format=NCHW, gate_bias=True):
    input = torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=memory_format).requires_grad_()
    split, copies = SPLITS[case]
    weight = make(sum(split), 3, 1, 1, dtype=dtype) if split else None
    operands = (input, make(4, 3, 1, 1, dtype=dtype), make(4, dtype=dtype) if gate_bias else None, weight)
    return operands, (split, copies)


@pytest.mark.parametrize("memory_format", [NCHW, NHWC])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("case", SPLITS)
def test_gated_split_opcheck(case, activation, memory_format):
    operands, split = split_operands(case, torch.float32, memory_format, gate_bias=activation == "relu")
    torch.library.opcheck(OPS.gated_split.default, (*operands, *split, activation))
    input, gate_weight, _, weight = (o if o is None else o.detach() for o in operands)
    projected, gated, gate, _, _ = OPS.gated_split(input, gate_weight, None, weight, *split, activation)
    grads = [torch.randn_like(x) for x in projected], [torch.randn_like(x) for x in gated], torch.randn_like(gate)
    arguments = (*grads, input, gate, gate_weight, weight, activation)
    torch.library.opcheck(OPS.gated_split_backward.default, arguments, test_utils=FORWARD)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("case", SPLITS)
def test_gated_split_gradients(case, activation):
    operands, split = split_operands(case)

    def function(*tensors):
        projected, gated, gate, _, _ = OPS.gated_split(*tensors, *split, activation)
        return *projected, *gated, gate

    torch.autograd.gradcheck(function, operands)
    torch.autograd.gradgradcheck(function, operands)


def test_gated_split_with_unused_outputs():
    """Outputs that nobody uses have no gradient: the others' are the same as with zeros for them."""
    operands, split = split_operands("both")
    projected, gated, _, _, _ = OPS.gated_split(*operands, *split, "none")
    grads = torch.autograd.grad(projected[1].sum() + gated[0].sum(), operands)
    projected, gated, gate, _, _ = OPS.gated_split(*operands, *split, "none")
    total = projected[1].sum() + gated[0].sum() + 0 * (projected[0].sum() + gated[1].sum() + gate.sum())
    for given, wanted in zip(grads, torch.autograd.grad(total, operands), strict=True):
        torch.testing.assert_close(given, wanted)


def test_statistics_carry_no_gradient():
    operands, split = split_operands("both")
    *_, mean, var = OPS.gated_split(*operands, *split, "none")
    assert not mean.requires_grad and not var.requires_grad


SUMS = [
    (with_input, gated, normed, training, activation)
    for with_input, gated in ((False, False), (True, False), (True, True))
    for normed, training in ((False, False), (True, False), (True, True))
    for activation in ("none", "relu")
]


def sum_operands(dtype=torch.float64, memory_format=NCHW):
    """input, gate, a term of its size, a smaller one, two weights and two biases of norms."""
    maps = [torch.randn(2, 3, *size, dtype=dtype).to(memory_format=memory_format) for size in ((4, 5), (4, 5), (2, 3))]
    input, same, small = (x.requires_grad_() for x in maps)
    gate = torch.rand(2, 1, 4, 5, dtype=dtype).requires_grad_()
    return (input, gate, same, small, *(make(3, dtype=dtype) for _ in range(4)))


@pytest.mark.parametrize("mode, align_corners", [("bilinear", False), ("bilinear", True), ("nearest", False)])
@pytest.mark.parametrize("with_input, gated, normed, training, activation", SUMS)
def test_batch_norm_sum_gradients(with_input, gated, normed, training, activation, mode, align_corners):
    def function(input, gate, same, small, *norms):
        terms = [same, small]
        arguments = norm_arguments(terms, norms if normed else None, training)
        operands = (input if with_input else None, gate if gated else None, terms)
        return OPS.batch_norm_sum(*operands, *arguments, activation, mode, align_corners)

    torch.autograd.gradcheck(function, sum_operands())
    if mode == "bilinear" and not align_corners:
        torch.autograd.gradgradcheck(function, sum_operands())


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_a_single_norm(training):
    """Its ReLU's mask is made from the term; the output is not kept."""

    def function(term, *norm):
        return OPS.batch_norm_sum(
            None, None, [term], *norm_arguments([term], norm, training), "relu", "bilinear", False
        )

    operands = make(2, 3, 4, 5), make(3), make(3)
    torch.autograd.gradcheck(function, operands)
    torch.autograd.gradgradcheck(function, operands)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        function(*operands)
    assert [tuple(tensor.shape) for tensor in kept if tensor is not None and tensor.dim() == 4] == [(2, 3, 4, 5)]


@pytest.mark.parametrize("training", [False, True])
def test_single_norm_opcheck(training):
    term, weight, bias = (x.detach() for x in (make(2, 3, 4, 5), make(3), make(3)))
    mean, var = statistics([term])
    backward = (torch.randn_like(term), None, [term], mean, var, [1e-5], "bilinear", False, weight, bias)
    torch.library.opcheck(OPS.batch_norm_sum_backward.default, backward, test_utils=FORWARD)
    sums = OPS.batch_norm_sum_backward(*backward)[2] if training else None
    arguments = (backward[0], [], [term], mean, var, [weight], [1e-5], sums, None, bias)
    torch.library.opcheck(OPS.batch_norm_sum_backward_terms.default, arguments, test_utils=FORWARD)


def carried(operands, activation="none", ops=OPS):
    """A sum that multiplies by the gate of a branch itself, and returns its gradient through the split's carrier."""
    input, gate_weight, gate_bias, weight, gamma, beta = operands
    split = ops.gated_split(input, gate_weight, gate_bias, weight, [3], 1, activation, 1)
    projected, (copy, carrier), gate, _, _ = split
    terms = [projected[0], copy]
    arguments = norm_arguments(terms, (gamma, gamma, beta, beta), True)
    return ops.batch_norm_sum(input, gate[:, 2:3], terms, *arguments, "relu", "bilinear", False, carrier), carrier


def carried_operands(dtype=torch.float64):
    shapes = (2, 3, 4, 5), (4, 3, 1, 1), (4,), (3, 3, 1, 1), (3,), (3,)
    return tuple(make(*shape, dtype=dtype) for shape in shapes)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_gradients_through_a_carrier(activation):
    """First and second ones; neither a copy nor the input is kept for the gate's sake, nor is there memory for the carrier."""
    operands = carried_operands()
    torch.autograd.gradcheck(lambda *o: carried(o, activation)[0], operands)
    torch.autograd.gradgradcheck(lambda *o: carried(o, activation)[0], operands)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        _, carrier = carried(operands, activation)
    maps = [x for x in kept if x is not None and x.shape[1:] == (3, 4, 5)]
    assert len({x.data_ptr() for x in maps}) == 4  # the input, two terms and the sum
    assert carrier.untyped_storage().nbytes() == carrier.element_size() and not carrier.any()


def test_carriers_under_transforms():
    """Forward mode knows nothing of carriers, reverse mode over forward mode, and the batch of a vmap."""
    operands = tuple(o.detach() for o in carried_operands())
    tangents = tuple(torch.randn_like(o) for o in operands)
    scalar = lambda *o: carried(o)[0].square().sum()  # noqa: E731
    everything = tuple(range(len(operands)))
    grads = torch.func.grad(scalar, everything)(*operands)
    _, slope = torch.func.jvp(scalar, operands, tangents)
    torch.testing.assert_close(slope, sum((g * t).sum() for g, t in zip(grads, tangents, strict=True)))
    step = 1e-6
    moved = [
        torch.func.grad(scalar, everything)(*(o + s * step * t for o, t in zip(operands, tangents, strict=True)))
        for s in (1, -1)
    ]
    _, found = torch.func.jvp(torch.func.grad(scalar, everything), operands, tangents)
    for f, up, down in zip(found, *moved, strict=True):
        torch.testing.assert_close(f, (up - down) / (2 * step), rtol=1e-5, atol=1e-5)
    batch = torch.stack([operands[0], operands[0].flip(0)])
    per_element = torch.func.vmap(torch.func.grad(scalar), (0, *(None,) * 5))(batch, *operands[1:])
    for found, element in zip(per_element, batch, strict=True):
        torch.testing.assert_close(found, torch.func.grad(scalar)(element, *operands[1:]))


def test_opcheck_with_carriers():
    input, gate_weight, gate_bias, weight, gamma, beta = carried_operands(torch.float32)
    torch.library.opcheck(OPS.gated_split.default, (input, gate_weight, gate_bias, weight, [3], 1, "none", 2))
    term, gate = make(2, 3, 2, 3, dtype=torch.float32), torch.rand(2, 1, 4, 5)
    carrier = torch.zeros(()).requires_grad_().expand(2, 3, 4, 5)
    arguments = norm_arguments([term], (gamma, beta), True)
    operands = (input, gate, [term], *arguments, "relu", "bilinear", False, carrier)
    torch.library.opcheck(OPS.batch_norm_sum.default, operands)


# Slow, so not every combination: the training form everywhere, the others once.
OPCHECKED = [case for case in SUMS if case[2:] == (True, True, "relu")] + SUMS[:1] + SUMS[8:9]


@pytest.mark.parametrize("memory_format", [NCHW, NHWC])
@pytest.mark.parametrize("with_input, gated, normed, training, activation", OPCHECKED)
def test_batch_norm_sum_opcheck(with_input, gated, normed, training, activation, memory_format):
    input, gate, same, small, *norms = sum_operands(torch.float32, memory_format)
    terms = [same, small]
    arguments = norm_arguments(terms, norms if normed else None, training)
    operands = (input if with_input else None, gate if gated else None, terms)
    torch.library.opcheck(OPS.batch_norm_sum.default, (*operands, *arguments, activation, "bilinear", False))
    terms = [term.detach() for term in terms]
    mean, var, weight, _, eps, *_ = (
        [x.detach() if isinstance(x, torch.Tensor) else x for x in a] for a in arguments[:5]
    )
    output = torch.randn_like(input) if activation == "relu" else None
    backward = (torch.randn_like(input), output, terms, mean, var, eps, "bilinear", False)
    torch.library.opcheck(OPS.batch_norm_sum_backward.default, backward, test_utils=FORWARD)
    if normed:
        grad_sum, gathered, sums = OPS.batch_norm_sum_backward(*backward)
        grad_sum = backward[0] if output is None else grad_sum
        for counts in (None, torch.tensor([40.0, 12.0])):
            rest = (terms, mean, var, weight, eps, sums if training else None, counts)
            arguments = (grad_sum, gathered, *rest)
            torch.library.opcheck(OPS.batch_norm_sum_backward_terms.default, arguments, test_utils=FORWARD)


def test_channel_statistics():
    x = torch.randn(3, 4, 5, 6)
    torch.library.opcheck(OPS.channel_statistics.default, (x,))
    mean, var = OPS.channel_statistics(x.double())
    wanted = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, wanted.mean(1))
    torch.testing.assert_close(var, wanted.var(1, correction=0))
