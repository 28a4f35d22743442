"""Running statistics in training mode, as the modules keep them: by every backend's operator, and by ``norm_sum``."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import gsto_ops
from gsto_ops import reference
from gsto_ops.norm_sum import norm_sum

OPS = torch.ops.gsto_ops
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(params=["reference", "cpu", "emulated", GPU])
def backend(request, tmp_path_factory):
    """The operator of a backend, and its device."""
    if request.param == "reference":
        return reference.update_running_statistics_, "cpu"
    if request.param == "emulated":
        return request.getfixturevalue("emulated_operators").update_running_statistics_, "cpu"
    if request.param == "cpu":
        pytest.importorskip("gsto_ops._C", reason="the C++ extension is not there", exc_type=ImportError)
    return OPS.update_running_statistics_, "cuda" if request.param == "gpu" else "cpu"


def buffers(dtype, channels, device="cpu"):
    """Running means, running variances and numbers of batches."""
    means, variances = ([f(c, device=device).to(dtype) for c in channels] for f in (torch.randn, torch.rand))
    return means, variances, [torch.tensor(3 + k, device=device) for k in range(len(channels))]


def statistics(channels, dtype=torch.float32, device="cpu"):
    return [[f(c, dtype=dtype, device=device) for c in channels] for f in (torch.randn, torch.rand)]


@pytest.mark.parametrize("counted", [False, True], ids=["pixels", "counts"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(backend, dtype, momentum, counted):
    """Against the formula in float64, rounded once."""
    update, device = backend
    torch.manual_seed(0)
    channels, pixels = [130, 1, 7] * 4, [2, 1000, 31] * 4  # more norms than a launch takes
    given, (mean, var) = buffers(dtype, channels, device), statistics(channels, device=device)
    before = copy.deepcopy(given)
    counts = [torch.tensor(2.0 * n, device=device) for n in pixels] if counted else []
    update(*given, mean, var, pixels, counts, momentum)
    for k, n in enumerate(2 * n if counted else n for n in pixels):
        share = 1 / (4 + k) if momentum is None else momentum
        wanted = [b[k].double() * (1 - share) for b in before[:2]]
        wanted = [w + share * x for w, x in zip(wanted, (mean[k].double(), var[k].double() * n / (n - 1)), strict=True)]
        tiny = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
        for found, exact in zip((given[0][k], given[1][k]), wanted, strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), exact, rtol=tiny, atol=tiny)
        assert given[2][k] == 4 + k


def test_strides_and_a_norm_that_is_there_twice(backend):
    update, device = backend
    means, variances, batches = buffers(torch.float32, [6, 6], device)
    means[1] = torch.randn(12, device=device)[::2]
    (mean, other), (var, _) = statistics([6, 6], device=device)
    wanted = means[1].lerp(mean, 1 / 5).lerp(other, 1 / 6), variances[1].lerp(var * 2, 1 / 5).lerp(var * 2, 1 / 6)
    twice = [[t[1]] * 2 for t in (means, variances, batches)]
    update(*twice, [mean, torch.stack([other, other], 1)[:, 0]], [var, var], [2, 2], [], None)
    assert batches[1] == 6
    torch.testing.assert_close((means[1], variances[1]), wanted)


@pytest.mark.parametrize("backend", ["cpu", "emulated", GPU], indirect=True)
def test_bad_operands_are_named(backend):
    update, device = backend
    given, (mean, var) = buffers(torch.float32, [4], device), statistics([4], device=device)
    with pytest.raises(RuntimeError, match="all lists must be as long as mean, 1; counts may be empty"):
        update(*given, mean, [], [5], [], 0.1)
    with pytest.raises(RuntimeError, match=r"running_mean must have shape \(4\)"):
        update([given[0][0][:3]], *given[1:], mean, var, [5], [], 0.1)
    with pytest.raises(RuntimeError, match="num_batches_tracked must be one int64 on the device of mean, got Int"):
        update(*given[:2], [given[2][0].int()], mean, var, [5], [], 0.1)


class Sum(nn.Module):
    """Two maps of different sizes, normalised, summed and rectified."""

    def __init__(self, momentum=(0.1, 0.1), channels=3, **options):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels, momentum=m, **options) for m in momentum)

    def forward(self, x):
        return norm_sum(None, [x, x[..., ::2, ::2] * 2], list(self.norms), activation="relu")


def plain(module, x):
    """What the modules themselves do."""
    for norm, term in zip(module.norms, (x, x[..., ::2, ::2] * 2), strict=True):
        norm(term)


def image(batch=4, dtype=torch.float32):
    return torch.randn(batch, 3, 6, 8, generator=torch.Generator().manual_seed(batch)).to(dtype)


def assert_same_buffers(found, wanted, **tolerance):
    for (name, a), (_, b) in zip(found.named_buffers(), wanted.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


MOMENTA = [(0.1, 0.1), (0.3, 0.01), (None, None), (None, 0.1), (0.0, 1.0)]


@pytest.mark.parametrize("backend_name", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
def test_buffers_are_those_of_the_modules(momentum, dtype, backend_name):
    found, wanted = Sum(momentum).to(dtype), Sum(momentum).to(dtype)
    with gsto_ops.use_backend(backend_name):
        for batch in (1, 4, 3):
            found(image(batch, dtype)).sum().backward()
            plain(wanted, image(batch, dtype))
    assert_same_buffers(found, wanted, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-7)
    assert [int(norm.num_batches_tracked) for norm in found.norms] == [3, 3]


def test_bfloat16_buffers():
    """Rounded once per batch."""
    found = Sum().bfloat16()
    found(image(dtype=torch.bfloat16))
    wanted = Sum().double()
    plain(wanted, image(dtype=torch.bfloat16).double())
    for (name, a), (_, b) in zip(found.named_buffers(), wanted.named_buffers(), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2**-8, atol=2**-12, msg=name)


@pytest.mark.parametrize("change", ["not tracked", "no buffers", "eval"])
def test_buffers_that_stay(change):
    module = Sum(track_running_stats=change != "no buffers")
    if change == "not tracked":
        module.norms[0].track_running_stats = False
    if change == "eval":
        module.eval()
    before = copy.deepcopy(module)
    module(image())
    if change == "not tracked":  # the other one's move
        assert module.norms[1].num_batches_tracked == 1
        module.norms[1].load_state_dict(before.norms[1].state_dict())
    assert_same_buffers(module, before, rtol=0, atol=0)


def test_the_released_gates_norms():
    """Of a branch's logits, as the modules one by one."""
    torch.manual_seed(0)
    channels, momenta = (4, 6), ((0.1, None), (0.3, 0.3))
    gates = [
        [[nn.Conv2d(c, 1, 1, bias=False), nn.BatchNorm2d(1, momentum=m)] for c, m in zip(channels, row, strict=True)]
        for row in momenta
    ]
    up, down = [nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)], [[nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6)]]
    wanted = copy.deepcopy(gates)
    inputs = [torch.randn(2, 4, 6, 8), torch.randn(2, 6, 3, 4)]
    gsto_ops.gated_fusion(inputs, [[None, up], [down, None]], gates)
    for row, twins in zip(gates, wanted, strict=True):
        for (_, norm), (conv, twin), x in zip(row, twins, inputs, strict=True):
            twin(conv(x))
            assert_same_buffers(norm, twin)


@pytest.mark.parametrize("momentum", MOMENTA[:1] + MOMENTA[2:4], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_graph(momentum, dynamic):
    torch._dynamo.reset()
    found, wanted = Sum(momentum), Sum(momentum)
    targets = []

    def backend(graph, _):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(found, fullgraph=True, dynamic=dynamic, backend=backend)
    for batch in (2, 4, 3):
        compiled(image(batch)).sum().backward()
        plain(wanted, image(batch))
        assert_same_buffers(found, wanted)
    if dynamic:  # not compiled again
        assert targets.count(OPS.update_running_statistics_.default) == len(set(momentum))


def test_inductor_writes_to_the_buffers():
    torch._dynamo.reset()
    found, wanted = Sum((0.1, None)), Sum((0.1, None))
    compiled = torch.compile(found, fullgraph=True)
    for _ in range(2):
        compiled(image()).sum().backward()
        plain(wanted, image())
    assert_same_buffers(found, wanted)


def test_exported_training():
    """By PyTorch's own operators; by name, with this one."""
    for name in ("auto", "cpu"):
        if name == "cpu" and gsto_ops.backends.why_not("cpu"):
            continue
        found, wanted = Sum(), Sum()
        with gsto_ops.use_backend(name):
            program = torch.export.export(found, (image(),))
        assert ("gsto_ops.update_running_statistics_" in program.graph_module.print_readable(False)) == (name == "cpu")
        for module in (program.module(), program.run_decompositions().module()):
            module(image())
            plain(wanted, image())
            assert_same_buffers(module, wanted)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("counted", [False, True])
def test_opcheck(momentum, counted):
    given, (mean, var) = buffers(torch.float32, [4, 5]), statistics([4, 5])
    counts = [torch.tensor(8.0), torch.tensor(9.0)] if counted else []
    torch.library.opcheck(OPS.update_running_statistics_.default, (*given, mean, var, [7, 8], counts, momentum))


def test_an_ensemble_of_modules():
    modules = [Sum((0.1, None)) for _ in range(3)]
    images = torch.stack([image(2) + k for k in range(3)])
    base, (parameters, buffers) = copy.deepcopy(modules[0]), stack_module_state(modules)
    vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(parameters, buffers, images)
    for k, module in enumerate(modules):
        plain(module, images[k])
        for name, wanted in module.named_buffers():
            torch.testing.assert_close(buffers[name][k], wanted)
    with pytest.raises(RuntimeError, match="cannot write to running_mean unless it is mapped"):
        vmap(base)(images)
    torch.func.grad(lambda p: functional_call(base, p, (images[0],)).sum())(dict(base.named_parameters()))
    assert all(norm.num_batches_tracked == 1 for norm in base.norms)


def test_traced():
    module, wanted = Sum(), Sum()
    traced = torch.jit.trace(module, (image(),), check_trace=False)
    traced(image(2))
    for batch in (4, 2):
        plain(wanted, image(batch))
    assert_same_buffers(module, wanted)


def test_writing_is_seen_by_autograd():
    """A gradient that needs the old running statistics is refused, not made of the new ones."""
    module = Sum().eval()
    output = module(image().requires_grad_())
    module.train()(image())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
