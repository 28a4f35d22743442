"""What only a GPU can show: CUDA graphs, streams, several devices, 64-bit offsets, memory, compiled networks.

The values themselves are swept in test_sweep.py.
"""

import pytest
import torch
from opchecked import OPERATORS, check_operator

import gsto_models
import gsto_ops

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    if reason := gsto_ops.backends.why_not(request.param):
        pytest.skip(reason)
    with gsto_ops.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def layout(request):
    return request.param


def module_and_input(layout, dtype=torch.bfloat16, device="cuda", **options):
    module = gsto_ops.GatedScaleTransfer(48, 96, scale_factor=0.5, **options).to(device)
    x = torch.randn(2, 48, 64, 96, device=device).to(dtype).contiguous(memory_format=layout)
    return module.to(dtype), x.requires_grad_()


def step(module, x):
    module.zero_grad(set_to_none=True)
    x.grad = None
    output = module(x)
    output.float().square().mean().backward()
    return [output.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("options", [{}, {"norm": None, "activation": None}], ids=["norm", "plain"])
def test_graph_replay_equals_eager(backend, layout, options):
    module, x = module_and_input(layout, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(module, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, x)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [t.clone() for t in captured]
    for actual, expected in zip(replayed, step(module, x), strict=True):
        assert torch.equal(actual, expected)


def loss_step(logits, target):
    logits.grad = None
    loss = gsto_ops.upsample_cross_entropy(logits, target, ignore_index=255)
    loss.backward()
    return [loss.detach(), logits.grad]


def test_graph_replay_of_the_loss_equals_eager(backend, layout):
    logits = torch.randn(2, 19, 32, 64, device="cuda").bfloat16().contiguous(memory_format=layout).requires_grad_()
    target = torch.randint(0, 19, (2, 128, 256), device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            loss_step(logits, target)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_step(logits, target)
    with torch.no_grad():
        target.fill_(255)  # how many are labelled is known only when the graph runs
        target[:, 50:60] = 3
    graph.replay()
    replayed = [t.clone() for t in captured]
    for actual, expected in zip(replayed, loss_step(logits, target), strict=True):
        assert torch.equal(actual, expected)


def test_the_loss_has_no_map_of_upsampled_logits(backend, layout):
    logits = torch.randn(4, 19, 128, 256, device="cuda").bfloat16().contiguous(memory_format=layout).requires_grad_()
    target = torch.randint(0, 19, (4, 512, 1024), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss_step(logits, target)
    torch.cuda.synchronize()
    pixels, small = 4 * target.numel(), logits.numel() * logits.element_size()
    assert torch.cuda.max_memory_allocated() - before < pixels + 2 * small + (1 << 20)  # log-sum-exp, gradient, sums


def test_two_streams_do_not_meet(backend, layout):
    module, _ = module_and_input(layout)
    module.eval()
    inputs = [torch.randn(2, 48, 128, 128, device="cuda").bfloat16().contiguous(memory_format=layout) for _ in range(8)]
    with torch.no_grad():
        expected = [module(x) for x in inputs]
        streams = [torch.cuda.Stream() for _ in range(2)]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        outputs = []
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]):
                outputs.append(module(x))
        torch.cuda.synchronize()
    for actual, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_second_device(backend, layout):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    module, x = module_and_input(layout)
    expected = step(module, x)
    other, y = module.to("cuda:1"), x.detach().to("cuda:1").requires_grad_()
    assert torch.cuda.current_device() == 0
    for actual, wanted in zip(step(other, y), expected, strict=True):
        assert actual.device.index == 1
        torch.testing.assert_close(actual.cpu(), wanted.cpu())


def test_offsets_beyond_32_bits(backend, layout):
    channels, height, width = 20, 16384, 8192  # 2.7e9 elements: 5.4 GB in bf16
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("less than 24 GiB of GPU memory are free")
    x = torch.zeros(1, channels, height, width, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=layout)
    corner = torch.randn(channels, 64, 64, device="cuda").bfloat16()
    x[0, :, -64:, -64:] = corner
    rho = torch.randn(1, channels, 1, 1, device="cuda").bfloat16()
    weight = torch.randn(8, channels, 1, 1, device="cuda").bfloat16()
    size = (height // 2, width // 2)
    output = gsto_ops.gated_scale_transfer(x, rho, None, weight, size=size, mode="avg")
    expected = gsto_ops.gated_scale_transfer(
        corner[None].contiguous(memory_format=layout), rho, None, weight, size=(32, 32), mode="avg"
    )
    torch.testing.assert_close(output[:, :, -32:, -32:], expected)
    assert not output[:, :, : size[0] // 2].any()


def test_no_hidden_copies(backend, layout):
    """The forward pass allocates its outputs, and the backward pass its gradients, and little else."""
    x = torch.randn(4, 96, 256, 256, device="cuda").bfloat16().contiguous(memory_format=layout).requires_grad_()
    rho = torch.randn(1, 96, 1, 1, device="cuda").bfloat16().requires_grad_()

    def peak(function):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    output, forward = peak(lambda: gsto_ops.gated_scale_transfer(x, rho, scale_factor=0.5, mode="avg"))
    size = x.numel() * x.element_size()
    assert forward < 0.35 * size  # a quarter for the output, 1/96 for the gate
    seed = torch.randn_like(output)
    _, backward = peak(lambda: torch.autograd.grad(output, (x, rho), seed))
    assert backward < 1.1 * size


def test_tf32_is_used_only_where_torch_allows_it(backend):
    x = torch.randn(1, 256, 64, 64, device="cuda")
    rho, weight = torch.randn(1, 256, 1, 1, device="cuda") / 16, torch.randn(256, 256, 1, 1, device="cuda") / 16
    exact = gsto_ops.reference.gated_scale_transfer(
        x.double(), rho.double(), None, weight.double(), None, "none", (64, 64), "nearest"
    )[0]
    errors = {}
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allow in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allow
            errors[allow] = (
                (gsto_ops.gated_scale_transfer(x, rho, None, weight, scale_factor=1) - exact).abs().max().item()
            )
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert errors[False] < 1e-5 < errors[True] < 1e-2


def test_autocast_on_the_gpu(backend, layout):
    module, x = module_and_input(layout, dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        output = module(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(backend, name):
    check_operator("gsto_triton" if backend == "triton" else "gsto_ops", name, "cuda")


# one of each: the compiler takes a minute for a network
@pytest.mark.parametrize("backend, training", [("cuda", True), ("triton", False)], indirect=["backend"])
def test_compiled_network_equals_eager(backend, training):
    torch.manual_seed(0)
    model = gsto_models.create_model("gsto_hrnet_w18_small_v2", num_classes=11).cuda().train(training)
    x = torch.randn(2, 3, 64, 128, device="cuda")
    eager = model(x)
    compiled = torch.compile(model, fullgraph=True)(x)
    pairs = zip(eager, compiled, strict=True) if training else [(eager, compiled)]
    for e, c in pairs:
        torch.testing.assert_close(c, e, atol=1e-3, rtol=1e-2)
