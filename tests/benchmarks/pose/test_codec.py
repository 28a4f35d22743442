"""Joints to heatmaps and back."""

import math

import numpy as np
import pytest
import torch

from gsto_benchmarks.pose.codec import decode, encode


def literal_heatmap(x, y, height, width, sigma):
    """The protocol's words, pixel by pixel: centre int(x / 4 + 0.5), a square of 6 sigma + 1 pixels, peak 1."""
    cx, cy, heatmap = int(x / 4 + 0.5), int(y / 4 + 0.5), np.zeros((height, width))
    for j in range(height):
        for i in range(width):
            if abs(i - cx) <= 3 * sigma and abs(j - cy) <= 3 * sigma:
                heatmap[j, i] = math.exp(-((i - cx) ** 2 + (j - cy) ** 2) / (2 * sigma**2))
    return heatmap


@pytest.mark.parametrize("sigma", [2, 3])
def test_encode_is_the_protocols_heatmap(sigma):
    points = [(41.9, 63.2), (42.0, 61.9), (0.0, 0.0), (-6.0, 30.0), (71.0, 95.0), (90.0, 50.0)]
    joints = torch.tensor([[x, y, 1.0] for x, y in points])
    heatmaps, weights = encode(joints, (24, 18), sigma)
    assert heatmaps.shape == (6, 24, 18) and weights.tolist() == [1.0] * 6
    for heatmap, (x, y) in zip(heatmaps, points, strict=True):
        np.testing.assert_allclose(heatmap.numpy(), literal_heatmap(x, y, 24, 18, sigma), atol=1e-6)
    assert heatmaps[0].argmax() == 16 * 18 + 10 and heatmaps[1].argmax() == 15 * 18 + 11  # 10.975, 16.3; 11.0, 15.975


def test_a_gaussian_of_sigma_3_is_19_pixels_wide():
    heatmap = encode(torch.tensor([[144.0, 192.0, 1.0]]), (96, 72), 3)[0][0]
    rows, columns = torch.nonzero(heatmap, as_tuple=True)
    assert len(rows.unique()) == len(columns.unique()) == 19 and heatmap.max() == 1


@pytest.mark.parametrize(
    ("x", "y", "weight"),
    [
        (-38.0, 40.0, 1.0),  # centre -9: its square, 9 pixels to each side, still has column 0
        (-42.0, 40.0, 0.0),  # centre -10
        (4 * (17 + 9), 40.0, 1.0),
        (4 * (17 + 10), 40.0, 0.0),
        (40.0, 4 * (23 + 9), 1.0),
        (40.0, 4 * (23 + 10), 0.0),
    ],
)
def test_a_joint_whose_square_is_off_the_map_does_not_count(x, y, weight):
    heatmaps, weights = encode(torch.tensor([[x, y, 1.0]]), (24, 18), 3)
    assert weights.item() == weight and bool(heatmaps.any()) == bool(weight)


def test_an_unlabelled_joint_has_no_heatmap():
    heatmaps, weights = encode(torch.tensor([[40.0, 40.0, 0.0]]), (24, 18), 3)
    assert weights.item() == 0 and not heatmaps.any()


def test_quarter_pixel_towards_the_higher_neighbour():
    heatmaps = torch.zeros(1, 5, 10, 12)
    heatmaps[0, 0, 5, 6], heatmaps[0, 0, 5, 7] = 0.9, 0.5  # right
    heatmaps[0, 1, 5, 6], heatmaps[0, 1, 4, 6], heatmaps[0, 1, 5, 5] = 0.9, 0.5, 0.1  # up and left
    heatmaps[0, 2, 5, 11], heatmaps[0, 2, 5, 10] = 0.9, 0.5  # at the border: as it is
    heatmaps[0, 3, 5, 6] = 0.9  # no slope
    points, scores = decode(heatmaps)
    assert points[0].tolist() == [[6.25, 5], [5.75, 4.75], [11, 5], [6, 5], [0, 0]]
    np.testing.assert_allclose(scores[0], [0.9, 0.9, 0.9, 0.9, 0.0])


@pytest.mark.parametrize("sigma", [2, 3])
def test_dark_finds_where_a_gaussian_lies_between_the_pixels(sigma):
    rng = np.random.default_rng(0)
    true = torch.tensor(20 + 8 * rng.random((1, 16, 2)))
    y, x = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
    squares = (x - true[..., 0, None, None]) ** 2 + (y - true[..., 1, None, None]) ** 2
    heatmaps = torch.exp(-squares / (2 * sigma**2))
    dark, _ = decode(heatmaps, "dark", sigma)
    quarter, _ = decode(heatmaps)
    assert (dark - true).abs().max() < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decode(heatmaps, "dark", sigma)[0], dark)
    assert 0.1 < (quarter - true).abs().max() <= 0.2501
    # not a step away from the pixel where a map is flat or its maximum at the border
    assert decode(torch.ones(1, 1, 8, 8), "dark", sigma)[0].tolist() == [[[0, 0]]]


def test_unknown_decoding():
    with pytest.raises(ValueError, match=r"decoding must be one of .*'mean'"):
        decode(torch.zeros(1, 1, 8, 8), "mean")
