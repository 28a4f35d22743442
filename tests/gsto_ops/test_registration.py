"""The operators as the dispatcher sees them: opcheck, gradcheck, double backward, fake kernels, torch.compile."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gsto_ops
from gsto_ops.registration import layout_of

OP = torch.ops.gsto_ops.gated_scale_transfer.default
BACKWARD = torch.ops.gsto_ops.gated_scale_transfer_backward.default
RESAMPLINGS = [
    ((8, 10), "bilinear", False, None, None),
    ((8, 10), "bilinear", True, None, None),
    ((6, 7), "bilinear", False, 1.5, 1.5),
    ((2, 3), "avg", False, None, None),
    ((4, 5), "nearest", False, None, None),
]


def operands(dtype=torch.float64, memory_format=torch.contiguous_format, projects=True, requires_grad=True, batch=2):
    tensors = [
        torch.randn(batch, 3, 4, 5, dtype=dtype).to(memory_format=memory_format),
        torch.randn(1, 3, 1, 1, dtype=dtype),
        torch.randn(1, dtype=dtype),
    ]
    tensors += [torch.randn(2, 3, 1, 1, dtype=dtype), torch.randn(2, dtype=dtype)] if projects else [None, None]
    return [t if t is None else t.requires_grad_(requires_grad) for t in tensors]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("projects", [True, False])
@pytest.mark.parametrize("resampling", RESAMPLINGS)
def test_opcheck_forward(resampling, projects, memory_format):
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(OP, (*operands(dtype, memory_format, projects), *resampling))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("projects", [True, False])
def test_opcheck_backward(projects, memory_format):
    input, gate_weight, _, weight, _ = operands(torch.float32, memory_format, projects, requires_grad=False)
    grad_output, gate = torch.randn(2, 2 if projects else 3, 8, 10), torch.rand(2, 1, 4, 5)
    for grad_gate in (None, torch.randn_like(gate)):
        torch.library.opcheck(BACKWARD, (grad_output, grad_gate, input, gate, gate_weight, weight, *RESAMPLINGS[0][1:]))


@pytest.mark.parametrize("projects", [True, False])
@pytest.mark.parametrize("resampling", RESAMPLINGS)
def test_gradcheck(resampling, projects):
    torch.autograd.gradcheck(lambda *t: OP(*t, *resampling), operands(projects=projects))


@pytest.mark.parametrize("resampling", [RESAMPLINGS[0], RESAMPLINGS[3]])
def test_double_backward(resampling):
    torch.autograd.gradgradcheck(lambda *t: OP(*t, *resampling), operands(batch=1))


def test_frozen_parameters_get_no_gradient():
    tensors = operands()
    for frozen in (0, 3):
        tensors[frozen].requires_grad_(False)
    output, _ = OP(*tensors, *RESAMPLINGS[0])
    output.sum().backward()
    assert [t.grad is not None for t in tensors] == [False, True, True, False, True]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:, :, ::2],
        lambda x: x.to(memory_format=torch.channels_last)[:, :, 1:, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :1].expand(-1, 6, -1, -1),
        lambda x: x[:, :1],
        lambda x: x[:, :, :1, :1],
        lambda x: x[:, 1:5].to(memory_format=torch.channels_last)[:, 1:3],
    ],
)
@pytest.mark.parametrize("size", [(6, 5), (3, 2), (11, 13)])
def test_fake_strides_are_the_real_ones(view, size):
    input = view(torch.randn(2, 6, 6, 5))
    channels = input.shape[1]
    weights = torch.randn(1, channels, 1, 1), None, torch.randn(4, channels, 1, 1), None
    real = OP(input, *weights, size, "bilinear", False, None, None)
    backward = (real[0], None, input, real[1], weights[0], weights[2], "bilinear", False, None, None)
    real += BACKWARD(*backward)
    assert real[0].is_contiguous(memory_format=layout_of(input))
    with FakeTensorMode() as mode:

        def fake(arguments):
            return [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]

        faked = OP(*fake((input, *weights)), size, "bilinear", False, None, None) + BACKWARD(*fake(backward))
    for r, f in zip(real, faked, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


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
