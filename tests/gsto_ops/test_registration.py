"""The operators as the dispatcher sees them: opcheck, gradcheck, double backward, fake kernels, torch.compile."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gsto_ops
from gsto_ops.ops import gated_batch_norm_transfer, layout_of

OPS = torch.ops.gsto_ops
NCHW, NHWC = torch.contiguous_format, torch.channels_last
RESAMPLINGS = [
    ((8, 10), "bilinear", False, None, None),
    ((8, 10), "bilinear", True, None, None),
    ((6, 7), "bilinear", False, 1.5, 1.5),
    ((2, 3), "avg", False, None, None),
    ((4, 5), "nearest", False, None, None),
]


def cases(dtype=torch.float64, memory_format=NCHW, batch=2):
    """name -> (operator, differentiable operands, other arguments), with every optional operand present and absent."""

    def make(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    def image():
        return torch.randn(batch, 3, 4, 5, dtype=dtype).to(memory_format=memory_format).requires_grad_()

    def vector(size):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(size, dtype=wide).requires_grad_()

    found = {}
    for resampling in RESAMPLINGS:
        name = "-".join(str(part) for part in resampling[:3])
        for activation in ("none", "relu"):
            gated = (image(), make(1, 3, 1, 1), make(1), make(2, 3, 1, 1), make(2))
            found[f"gated_scale_transfer-{name}-{activation}"] = (
                "gated_scale_transfer",
                gated,
                (activation, *resampling),
            )
            affine = (image(), vector(3), vector(3))
            found[f"affine_scale_transfer-{name}-{activation}"] = (
                "affine_scale_transfer",
                affine,
                (activation, *resampling),
            )
            normed = (image(), make(1, 3, 1, 1), make(1), make(2, 3, 1, 1), vector(2), vector(2))
            found[f"gated_batch_norm_transfer-{name}-{activation}"] = (
                "gated_batch_norm_transfer",
                normed,
                (1e-3, activation, *resampling),
            )
    gate_only = (image(), make(1, 3, 1, 1), None, None, None)
    found["gated_scale_transfer-gate-only"] = ("gated_scale_transfer", gate_only, ("none", *RESAMPLINGS[0]))
    found["gated_projection"] = ("gated_projection", (image(), make(1, 3, 1, 1), make(1), make(2, 3, 1, 1)), ())
    found["gated_projection-no-bias"] = ("gated_projection", (image(), make(1, 3, 1, 1), None, make(2, 3, 1, 1)), ())
    found["class_map"] = ("class_map", (image(), make(2, 3, 1, 1), make(2)), ())
    found["class_map-no-bias"] = ("class_map", (image(), make(2, 3, 1, 1), None), ())
    normed = (image(), make(1, 3, 1, 1), None, make(2, 3, 1, 1), vector(2), vector(2))
    arguments = (1e-5, "relu", *RESAMPLINGS[0])
    found["gated_batch_norm_transfer-no-bias"] = ("gated_batch_norm_transfer", normed, arguments)
    found["gated_pyramid_pool"] = ("gated_pyramid_pool", (image(), make(2, 3, 1, 1), make(2)), ([1, 3],))
    found["gated_pyramid_pool-no-bias"] = ("gated_pyramid_pool", (image(), make(3, 3, 1, 1), None), ([2, 3, 6],))
    return found


@pytest.mark.parametrize("memory_format", [NCHW, NHWC])
@pytest.mark.parametrize("case", cases())
def test_opcheck_forward(case, memory_format):
    name, operands, others = cases(torch.float32, memory_format)[case]
    torch.library.opcheck(getattr(OPS, name).default, (*operands, *others))


def backward_arguments(name, operands, others, optional_grads):
    """The arguments of ``name_backward``, from a run of the forward operator."""
    operands = [o if o is None else o.detach() for o in operands]
    outputs = getattr(OPS, name)(*operands, *others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(o) if i == 0 or optional_grads else None for i, o in enumerate(outputs)]
    x, *rest = operands
    if name == "gated_scale_transfer":
        rho, _, weight, bias = rest
        return (*grads, x, outputs[1], rho, weight, bias, others[0], *others[2:])
    if name == "gated_projection":
        rho, _, weight = rest
        return (*grads, x, outputs[1], rho, weight, outputs[0], outputs[2])
    if name == "gated_batch_norm_transfer":
        rho, _, *weights = rest
        return (grads[0], x, rho, *weights, *outputs[1:], *others[:2], *others[3:])
    if name == "class_map":
        return (*grads, x, rest[0])
    if name == "affine_scale_transfer":
        return (*grads, x, *rest, others[0], *others[2:])
    return (*grads, x, outputs[1], rest[0], *others)


@pytest.mark.parametrize("memory_format", [NCHW, NHWC])
@pytest.mark.parametrize("optional_grads", [True, False])
@pytest.mark.parametrize("case", [case for case in cases() if "(8, 10)-bilinear-True" not in case])
def test_opcheck_backward(case, optional_grads, memory_format):
    name, operands, others = cases(torch.float32, memory_format)[case]
    arguments = backward_arguments(name, operands, others, optional_grads)
    torch.library.opcheck(
        getattr(OPS, f"{name}_backward").default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("memory_format", [NCHW, NHWC])
def test_a_transfer_with_a_batch_norm_is_made_of_two_operators_where_it_has_no_kernel(memory_format):
    name = "gated_batch_norm_transfer"
    _, operands, others = cases(memory_format=memory_format)[f"{name}-no-bias"]
    operands = [o if o is None else o.detach() for o in operands]
    forward = (*operands, *others)
    backward = backward_arguments(name, operands, others, optional_grads=False)
    for operator, arguments in ((name, forward), (f"{name}_backward", backward)):
        made = getattr(gated_batch_norm_transfer, "_kernel" if operator == name else "_backward_kernel")(*arguments)
        for actual, expected in zip(made, getattr(OPS, operator)(*arguments), strict=True):
            torch.testing.assert_close(actual, expected)
            assert actual.stride() == expected.stride()


@pytest.mark.parametrize("memory_format", [NCHW, NHWC])
@pytest.mark.parametrize("case", cases())
def test_gradcheck(case, memory_format):
    name, operands, others = cases(memory_format=memory_format)[case]
    torch.autograd.gradcheck(lambda *t: getattr(OPS, name)(*t, *others), operands)


@pytest.mark.parametrize("case", [case for case in cases() if "relu" not in case and "nearest" not in case])
def test_double_backward(case):
    name, operands, others = cases(batch=1)[case]
    torch.autograd.gradgradcheck(lambda *t: getattr(OPS, name)(*t, *others), operands)


def test_frozen_parameters_get_no_gradient():
    name, operands, others = cases()["gated_scale_transfer-(8, 10)-bilinear-False-none"]
    for frozen in (0, 3):
        operands[frozen].requires_grad_(False)
    output, _ = getattr(OPS, name)(*operands, *others)
    output.sum().backward()
    assert [t.grad is not None for t in operands] == [False, True, True, False, True]


VIEWS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=NHWC),
    "sliced rows": lambda x: x[:, :, ::2],
    "sliced channels_last": lambda x: x.to(memory_format=NHWC)[:, :, 1:, ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:, :1].expand(-1, 6, -1, -1),
    "one channel": lambda x: x[:, :1],
    "one pixel": lambda x: x[:, :, :1, :1],
    "sliced channels": lambda x: x[:, 1:5].to(memory_format=NHWC)[:, 1:3],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("size", [(6, 5), (3, 2), (11, 13)])
def test_fake_strides_are_the_real_ones(view, size):
    x = VIEWS[view](torch.randn(2, 6, 6, 5))
    channels = x.shape[1]
    rho, weight = torch.randn(1, channels, 1, 1), torch.randn(4, channels, 1, 1)
    affine, norm = torch.randn(2, channels).unbind(), torch.randn(2, 4).unbind()
    resampling = (size, "bilinear", False, None, None)
    calls = [
        ("gated_scale_transfer", (x, rho, None, weight, None), ("none", *resampling)),
        ("affine_scale_transfer", (x, *affine), ("relu", *resampling)),
        ("gated_projection", (x, rho, None, weight), ()),
        ("class_map", (x, weight, None), ()),
        ("gated_batch_norm_transfer", (x, rho, None, weight, *norm), (1e-5, "relu", *resampling)),
        ("gated_pyramid_pool", (x, torch.cat([rho, rho]), None), ([1, 2],)),
    ]
    for name, operands, others in calls:
        backward = backward_arguments(name, operands, others, optional_grads=False)
        for operator, arguments in ((name, (*operands, *others)), (f"{name}_backward", backward)):
            real = getattr(OPS, operator)(*arguments)
            with FakeTensorMode() as mode:
                faked = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
                fake = getattr(OPS, operator)(*faked)
            real, fake = ((r if isinstance(r, tuple) else (r,)) for r in (real, fake))
            for r, f in zip(real, fake, strict=True):
                assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), operator
            if not operator.startswith("gated_pyramid_pool"):
                assert real[0].is_contiguous(memory_format=layout_of(x)), operator


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("out_channels", [None, 4])
def test_compile_fullgraph(num_classes, out_channels):
    module = gsto_ops.GatedScaleTransfer(6, out_channels, scale_factor=2, num_classes=num_classes)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 8, 8)
    for actual, expected in [(compiled(x), module(x))]:
        torch.testing.assert_close(actual, expected)
    first = lambda y: y[0] if num_classes else y  # noqa: E731
    first(compiled(x)).square().mean().backward()
    compiled_grads = [p.grad for p in module.parameters()]
    module.zero_grad(set_to_none=True)
    first(module(x)).square().mean().backward()
    for p, grad in zip(module.parameters(), compiled_grads, strict=True):
        torch.testing.assert_close(grad, p.grad, atol=1e-5, rtol=1e-4)


def test_compile_dynamic_sizes_does_not_recompile():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    weights = torch.randn(1, 6, 1, 1), None, torch.randn(4, 6, 1, 1), None
    function = torch.compile(
        lambda x: gsto_ops.gated_scale_transfer(x, *weights, scale_factor=2),
        fullgraph=True,
        dynamic=True,
        backend=count,
    )
    for height, width in [(5, 7), (6, 9), (11, 4)]:
        x = torch.randn(2, 6, height, width)
        torch.testing.assert_close(function(x), gsto_ops.gated_scale_transfer(x, *weights, scale_factor=2))
    assert len(graphs) == 1
