"""The RSP head: its local attention against a loop over pixels, its layers, and that it learns."""

import math

import pytest
import torch
import torch.nn.functional as F

from gsto_models import complexity, create_model
from gsto_models.rsp import RelationalSemanticsPropagator, RSPHead, local_attention


def loop(query, key, value, position, ratio):
    """Every pixel, head and neighbour in turn; what lies outside the map does not take part."""
    n, _, height, width = query.shape
    heads, d, cells = position.shape
    h, w = key.shape[-2:]
    k = math.isqrt(cells)
    e = value.shape[1] // heads
    output = torch.zeros(n, heads * e, height, width, dtype=query.dtype)
    for b in range(n):
        for head in range(heads):
            for y in range(height):
                for x in range(width):
                    q = query[b, head * d : (head + 1) * d, y, x]
                    logits, values = [], []
                    for o in range(cells):
                        i, j = y // ratio + o // k - k // 2, x // ratio + o % k - k // 2
                        if 0 <= i < h and 0 <= j < w:
                            logits.append(q @ (key[b, head * d : (head + 1) * d, i, j] + position[head, :, o]) / d**0.5)
                            values.append(value[b, head * e : (head + 1) * e, i, j])
                    weights = torch.stack(logits).softmax(0)
                    output[b, head * e : (head + 1) * e, y, x] = weights @ torch.stack(values)
    return output


CASES = [
    ((6, 8), (3, 4), 2, 3),
    ((5, 7), (3, 4), 2, 3),  # odd sizes: the last cells have fewer pixels
    ((5, 8), (3, 4), 2, 5),  # a region larger than the map
    ((4, 5), (4, 5), 1, 3),
    ((7, 9), (3, 3), 3, 1),
]


@pytest.mark.parametrize(("low", "high", "ratio", "k"), CASES)
def test_local_attention_is_the_loop(low, high, ratio, k):
    query = torch.randn(2, 6, *low, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 6, *high, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 4, *high, dtype=torch.float64, requires_grad=True)
    position = torch.randn(2, 3, k * k, dtype=torch.float64, requires_grad=True)
    tensors = (query, key, value, position)
    found, expected = local_attention(*tensors), loop(*tensors, ratio)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(found)
    for f, e in zip(
        torch.autograd.grad((found * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


def test_attention_is_local_and_normalised():
    query, key = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4)
    position = torch.randn(2, 2, 9)
    torch.testing.assert_close(local_attention(query, key, torch.ones(1, 2, 4, 4), position), torch.ones(1, 2, 8, 8))
    value = torch.zeros(1, 2, 4, 4)
    value[:, :, 0, 0] = 1
    reached = local_attention(query, key, value, position)[0, 0] > 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:4, :4] = True  # the pixels of the cells within one cell of (0, 0)
    assert torch.equal(reached, expected)


@pytest.mark.parametrize(("low", "high", "cells"), [((6, 8), (4, 4), 9), ((6, 8), (3, 3), 9), ((6, 8), (3, 4), 4)])
def test_local_attention_rejects_sizes(low, high, cells):
    with pytest.raises(ValueError, match="must be"):
        local_attention(torch.zeros(1, 4, *low), *[torch.zeros(1, 4, *high)] * 2, torch.zeros(2, 2, cells))


def conv_bn_relu(x, s, key, padding=0):
    x = F.conv2d(x, s[f"{key}.0.weight"], padding=padding)
    stats = [s[f"{key}.1.running_mean"], s[f"{key}.1.running_var"]]
    return F.relu(F.batch_norm(x, *stats, s[f"{key}.1.weight"], s[f"{key}.1.bias"]))


def propagate(low, high, s, key=""):
    inputs = (("query", low), ("key", high), ("value", high))
    projected = [F.conv2d(x, s[f"{key}extractor.{n}.weight"]) for n, x in inputs]
    context = loop(*projected, s[f"{key}extractor.position"], 2)
    return conv_bn_relu(torch.cat([low, context], 1), s, f"{key}fuse", padding=1)


def test_propagator_is_its_definition():
    model = RelationalSemanticsPropagator(8, region_size=3, heads=2).double().eval()
    low = torch.randn(1, 8, 6, 7, dtype=torch.float64)
    high = torch.randn(1, 8, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = propagate(low, high, model.state_dict())
        torch.testing.assert_close(model(low, high), expected, rtol=1e-10, atol=1e-10)


def test_head_is_its_definition():
    head = RSPHead([3, 5, 7], 4, channels=8, region_size=3, heads=2).double().eval()
    sizes = ((3, 9, 7), (5, 5, 4), (7, 3, 2))
    features = [torch.randn(1, *size, dtype=torch.float64) for size in sizes]
    s = head.state_dict()
    with torch.no_grad():
        (found,) = head(features)
        x, y, top = (conv_bn_relu(f, s, f"laterals.{k}") for k, f in enumerate(features))
        y = propagate(y, top, s, "propagators.1.")
        x = propagate(x, y, s, "propagators.0.")
        expected = F.conv2d(x, s["classifier.weight"], s["classifier.bias"])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("size", [(64, 96), (65, 99)])
def test_network_outputs(size):
    model = create_model("rsp_r50", num_classes=3, region_size=3)
    shape = tuple(-(-n // 4) for n in size)
    assert [m.shape for m in model(torch.randn(2, 3, *size))] == [(2, 3, *shape)]
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, *size)).shape == (1, 3, *shape)


def test_gradients_reach_every_parameter():
    model = create_model("rsp_r50", num_classes=3)
    (logits,) = model(torch.randn(2, 3, 64, 64))
    (logits * torch.randn_like(logits)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name, lr", [("rsp_r50", 0.02), ("pspnet_r50", 0.002)])
def test_loss_falls(name, lr):
    options = {} if name == "rsp_r50" else {"gate": "supervised", "gate_bias_init": 4.0, "output_stride": 16}
    model = create_model(name, num_classes=2, **options)
    images = torch.randn(2, 3, 64, 64)
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, 16:48, 16:48] = 1
    images[:, 0] += 3 * labels
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(8):
        maps = model(images)
        loss = sum(
            F.cross_entropy(F.interpolate(m, size=(64, 64), mode="bilinear"), labels) * w
            for m, w in zip(maps, (1.0, 0.5), strict=False)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses


def test_attention_is_counted():
    cost = complexity(create_model("rsp_r50", num_classes=7), (64, 128))
    c, k = 128, 5
    levels = [16 * 32, 8 * 16, 4 * 8, 2 * 4]
    laterals = sum(p * c * width for p, width in zip(levels, (256, 512, 1024, 2048), strict=True))
    # each level but the top: query at its own size, key and value at a quarter of it, the two products of attention, fusion
    propagators = sum(p * (c * c + 2 * c * c // 4 + 2 * c * k * k + 9 * 2 * c * c) for p in levels[:-1])
    trunk = complexity(create_model("pspnet_r50", output_stride=16), (64, 128)).macs_as_defined
    assert cost.macs_as_defined > laterals + propagators
    head = laterals + propagators + levels[0] * c * 7
    backbone = cost.macs_as_defined - head
    assert 0 < backbone < trunk
    # ResNet-50's convolutions at 64x128 are those at 224x224 (4,087,136,256) times the ratio of the areas, to the sizes' rounding
    assert backbone == pytest.approx(4_087_136_256 * 64 * 128 / 224**2, rel=0.01)
