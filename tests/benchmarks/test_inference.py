"""Protocols applied to images, against the same steps written out in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gsto_benchmarks.segmentation.inference import predict, window_starts
from gsto_benchmarks.segmentation.protocol import Protocol

CLASSES = 5


class Strided(nn.Module):
    """Logits at 1/4, with context; remembers the sizes that it was given."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, CLASSES, 7, stride=4, padding=3)
        nn.init.normal_(self.conv.weight, std=0.5)
        self.sizes = []

    def forward(self, images):
        self.sizes.append(tuple(images.shape[-2:]))
        return self.conv(images)


@pytest.fixture
def network():
    return Strided().eval()


def interpolate(x, size):
    return F.interpolate(x.double(), size=tuple(size), mode="bilinear", align_corners=False)


def agree(prediction, scores):
    """Equal, but for pixels where two classes are equally likely up to float32's rounding."""
    top = scores.topk(2, 0).values
    clear = top[0] - top[1] > 1e-4 * top[0].abs().clamp(min=1)
    assert clear.double().mean() > 0.98
    assert prediction.dtype == torch.int64
    assert torch.equal(prediction[clear], scores.argmax(0)[clear])


@torch.no_grad()
def test_single_scale_gives_every_label_its_size(network):
    images, sizes = torch.randn(2, 3, 40, 56), [(40, 56), (33, 71)]
    maps = predict(network, images, sizes, Protocol())
    for index, size in enumerate(sizes):
        assert maps[index].shape == size
        agree(maps[index], interpolate(network(images), size)[index])


@torch.no_grad()
@pytest.mark.parametrize("fuse", ["softmax", "exp"])
def test_scales_and_flips(network, fuse):
    images, size, pairs = torch.randn(1, 3, 40, 57), (40, 57), [(1, 2)]
    double = nn.Sequential(network).double()
    scores = torch.zeros(CLASSES, *size, dtype=torch.float64)
    for scale in (0.5, 1.0, 1.75):
        scaled = interpolate(images, (int(40 * scale + 0.5), int(57 * scale + 0.5)))
        straight = interpolate(double(scaled), size)
        mirrored = interpolate(double(scaled.flip(3)), size).flip(3)[:, [0, 2, 1, 3, 4]]
        logits = (straight + mirrored)[0] / 2
        scores += logits.softmax(0) if fuse == "softmax" else logits.exp()
    network.float()
    (prediction,) = predict(network, images, [size], Protocol((0.5, 1.0, 1.75), flip=True, fuse=fuse), pairs)
    agree(prediction, scores)


@torch.no_grad()
def test_the_fusions_differ(network):
    images = 3 * torch.randn(1, 3, 40, 56)
    maps = [predict(network, images, [(40, 56)], Protocol((0.5, 1.0), fuse=fuse))[0] for fuse in ("softmax", "exp")]
    assert (maps[0] != maps[1]).any()


@torch.no_grad()
def test_mirrored_image_has_the_mirrored_prediction(network):
    """With flips a prediction is symmetric: of the mirrored image it is the mirrored one, with left and right swapped."""
    images = torch.randn(1, 3, 40, 56)
    protocol, pairs = Protocol(flip=True), [(1, 2), (3, 4)]
    (one,), (other,) = (predict(network, x, [(40, 56)], protocol, pairs) for x in (images, images.flip(3)))
    swapped = torch.tensor([0, 2, 1, 4, 3])[other.flip(1)]
    assert (one == swapped).double().mean() > 0.995
    (without,) = predict(network, images, [(40, 56)], Protocol(), pairs)
    assert (one != without).any()


@torch.no_grad()
def test_windows_of_a_pointwise_network_change_nothing():
    pointwise = nn.Conv2d(3, CLASSES, 1)
    images = torch.randn(2, 3, 50, 70)
    whole = predict(pointwise, images, [(50, 70)] * 2, Protocol())
    for stride in ((16, 16), (10, 13), None):
        windows = predict(pointwise, images, [(50, 70)] * 2, Protocol(window=(16, 20), stride=stride))
        assert all((a == b).double().mean() > 0.999 for a, b in zip(whole, windows, strict=True))


@torch.no_grad()
def test_overlapping_windows_are_averaged(network):
    images = torch.randn(1, 3, 32, 48)
    total, count = torch.zeros(1, CLASSES, 32, 48, dtype=torch.float64), torch.zeros(32, 48)
    for left in (0, 8, 16):
        total[..., left : left + 32] += interpolate(network(images[..., left : left + 32]), (32, 32))
        count[:, left : left + 32] += 1
    (prediction,) = predict(network, images, [(32, 48)], Protocol(window=(32, 32), stride=(8, 8)))
    agree(prediction, (total / count)[0])


@torch.no_grad()
def test_small_images_are_padded_to_the_window_with_zeros(network):
    images = torch.randn(1, 3, 20, 48)
    padded = F.pad(images, (0, 0, 0, 12))
    logits = interpolate(network(padded), (32, 48))[..., :20, :]
    (prediction,) = predict(network, images, [(20, 48)], Protocol(window=(32, 48)))
    agree(prediction, logits[0])


@torch.no_grad()
def test_cityscapes_scales_over_1_go_by_windows(network):
    protocol = Protocol((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), window=(32, 64), window_above=1.0)
    predict(network, torch.randn(1, 3, 32, 64), [(32, 64)], protocol)
    assert network.sizes == [(16, 32), (24, 48), (32, 64), *[(32, 64)] * 12]


@torch.no_grad()
def test_pascal_context_scales_the_long_side(network):
    protocol = Protocol((0.5, 1.0), long_side=52, window=(48, 48), stride=(32, 32))
    predict(network, torch.randn(1, 3, 30, 40), [(30, 40)], protocol)
    # 0.5: 20x26, padded to one window; 1.0: 39x52, padded to 48x52: windows at columns 0 and 4
    assert network.sizes == [(48, 48)] * 3


@torch.no_grad()
def test_fusion_is_in_float32_under_autocast(network):
    images, logits = torch.randn(1, 3, 40, 56), []
    network.register_forward_hook(lambda module, args, output: logits.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        (prediction,) = predict(network, images, [(40, 56)], Protocol((0.5, 1.0)))
    assert [output.dtype for output in logits] == [torch.bfloat16] * 2
    agree(prediction, sum(interpolate(output, (40, 56))[0].softmax(0) for output in logits))


def test_windows_cover_the_image():
    assert window_starts(520, 480, 320) == [0, 40]
    assert window_starts(1040, 480, 320) == [0, 320, 560]
    assert window_starts(480, 480, 320) == [0]
    for length in range(48, 200):
        starts = window_starts(length, 48, 32)
        covered = {pixel for start in starts for pixel in range(start, start + 48)}
        assert covered == set(range(length)) and len(starts) == len(set(starts))


def test_names():
    assert Protocol().name == "ss" and Protocol(flip=True).name == "ss_flip"
    assert Protocol((0.5, 1.0), flip=True).name == "ms_flip"
    assert Protocol((0.5, 1.0), fuse="exp").name == "ms_exp"
    assert Protocol((1.5,)).name == "ss1.5" and Protocol(squash_label=(473, 473)).name == "ss_squashed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": ()}, r"scales.*\[\]"),
        ({"scales": (1.0, 0.0)}, r"scales.*\[1\.0, 0\.0\]"),
        ({"fuse": "mean"}, "fuse must be 'softmax' or 'exp', got 'mean'"),
        ({"long_side": 0}, "long_side must be >= 1, got 0"),
        ({"window": (0, 5)}, r"window.*\(0, 5\)"),
        ({"stride": (4, 4)}, r"stride \(4, 4\) needs a window"),
        ({"window": (8, 8), "stride": (8, 9)}, r"stride must not exceed the window \(8, 8\), got \(8, 9\)"),
    ],
)
def test_bad_protocols(arguments, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**arguments)
