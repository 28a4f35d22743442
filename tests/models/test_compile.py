"""torch.compile of whole networks: one graph, one more for open sizes, none after that; gradients through the compiled one."""

import pytest
import torch
from torch import nn

from gsto_models.config import TASKS, Options, Trunk
from gsto_models.hrnet import HRNet
from gsto_models.pyramid_pooling import PyramidPooling

TINY = Trunk(width=4, stage1_blocks=1, modules=(1, 1, 1), blocks=1)
GSTO = Options(gated_fusion=True, gated_transition=(2, 3), transition_form="paper", gate_bias_init=1.0)
# (images, height, width): none equal to another or to a number of channels, which dynamo would take for one size.
SIZES = [(2, 64, 96), (3, 96, 128), (4, 160, 224), (5, 75, 107)]


def network(training):
    model = HRNet(TINY, 5, TASKS["segmentation"], GSTO)
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
    return model.train(training)


@pytest.fixture
def graphs():
    """The graphs that are compiled in a test, and the backend that collects them."""
    torch._dynamo.reset()
    found = []

    def backend(graph, _):
        found.append(graph)
        return graph.forward

    yield found, backend
    torch._dynamo.reset()


def test_sizes_do_not_recompile(graphs):
    found, backend = graphs
    model = network(training=False)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    counts = []
    with torch.no_grad():
        for images, height, width in SIZES:
            x = torch.randn(images, 3, height, width)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
            counts.append(len(found))
    assert counts[0] == 1 and counts[-1] == counts[-2] <= 3, (
        counts
    )  # the batch opens one size later than height and width


def test_open_sizes_from_the_start(graphs):
    found, backend = graphs
    head = PyramidPooling(16, 5, gate="supervised", auxiliary=False, gate_bias=True, scale_equalizer=False).eval()
    compiled = torch.compile(head, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for images, height, width in SIZES:
            x = torch.randn(images, 16, height // 8, width // 8)
            torch.testing.assert_close(compiled(x), head(x), atol=1e-4, rtol=1e-4)
    assert len(found) == 1


def test_training_step():
    model = network(training=True).double()  # a bias before a batch norm has a gradient of nothing but rounding
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
        model.zero_grad(set_to_none=True)
        outputs = run(x)
        sum(output.square().mean() for output in outputs).backward()
        results.append([*outputs, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-8, rtol=1e-6)
