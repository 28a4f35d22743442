"""The launch plans and the tap arithmetic of the CUDA kernels: host functions, tested without a GPU."""

import math

import pytest
import torch

plans = pytest.importorskip("gsto_ops._C", reason="the C++ extension is not built")

SMS = [1, 108, 132]
AXES = [(1, 1), (1, 7), (7, 1), (5, 5), (9, 18), (18, 9), (13, 5), (5, 13), (16, 128), (128, 16), (33, 34), (1000, 3)]


def matrix(in_size, out_size, mode, align_corners=False, scale=0.0):
    """The resampling as an (out, in) matrix, from the taps."""
    found = torch.zeros(out_size, in_size, dtype=torch.float64)
    for o, (start, count, first, rest) in enumerate(plans.axis_taps(in_size, out_size, mode, align_corners, scale)):
        assert start >= 0 and count >= 1 and start + count <= in_size
        found[o, start : start + count] += rest
        found[o, start] += first - rest
    return found


@pytest.mark.parametrize("mode", ["bilinear", "align_corners", "avg", "nearest"])
@pytest.mark.parametrize("sizes", AXES, ids=str)
def test_taps_are_pytorchs(sizes, mode):
    in_size, out_size = sizes
    eye = torch.eye(in_size, dtype=torch.float64)[:, None, :, None]
    if mode == "avg":
        expected = torch.nn.functional.adaptive_avg_pool2d(eye, (out_size, 1))
    elif mode == "nearest":
        expected = torch.ops.aten.upsample_nearest2d(eye, (out_size, 1))
    else:
        expected = torch.ops.aten.upsample_bilinear2d(eye, (out_size, 1), mode == "align_corners")
    found = matrix(in_size, out_size, "bilinear" if mode == "align_corners" else mode, mode == "align_corners")
    torch.testing.assert_close(found, expected[:, 0, :, 0].T, rtol=0, atol=1e-6)


# Nearest with equal sizes and a scale other than 1 is left out: there PyTorch's CPU kernel copies and its CUDA kernel steps.
GIVEN = [(7, 17, 2.5, "bilinear"), (17, 5, 0.3, "bilinear"), (9, 9, 1.05, "bilinear")]
GIVEN += [(7, 17, 2.5, "nearest"), (17, 5, 0.3, "nearest")]


@pytest.mark.parametrize(("in_size", "out_size", "scale", "mode"), GIVEN)
def test_taps_step_by_a_given_scale(in_size, out_size, scale, mode):
    eye = torch.eye(in_size, dtype=torch.float64)[:, None, :, None]
    if mode == "nearest":
        expected = torch.ops.aten.upsample_nearest2d(eye, (out_size, 1), scale, 1.0)
    else:
        expected = torch.ops.aten.upsample_bilinear2d(eye, (out_size, 1), False, scale, 1.0)
    torch.testing.assert_close(matrix(in_size, out_size, mode, False, scale), expected[:, 0, :, 0].T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["bilinear", "avg", "nearest"])
@pytest.mark.parametrize("sizes", AXES, ids=str)
def test_readers_are_the_transpose_of_taps(sizes, mode):
    taps = plans.axis_taps(*sizes, mode)
    for i, (begin, end) in enumerate(plans.axis_readers(*sizes, mode)):
        assert list(range(begin, end)) == [
            o for o, (start, count, _, _) in enumerate(taps) if start <= i < start + count
        ]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "sizes", [((64, 128), (128, 256)), ((5, 7), (40, 56)), ((300, 7), (30, 3)), ((1, 1), (512, 1024))], ids=str
)
def test_resample_tiles(sizes, transposed, channels_last, element_size):
    (h, w), (oh, ow) = sizes
    for mode in ("bilinear", "avg", "nearest"):
        plan = plans.plan_resample(
            *sizes, mode, transposed=transposed, channels_last=channels_last, element_size=element_size
        )
        height, width = (h, w) if transposed else (oh, ow)
        tile_height, tile_width = plan["tile"]
        assert tile_height * tile_width <= 64
        assert tile_width & (tile_width - 1) == 0
        assert channels_last or tile_width % (16 // element_size) == 0  # a 16-byte unit lies in one row
        assert plan["tiles"] == math.ceil(height / tile_height) * math.ceil(width / tile_width)
        assert plan["fits"] and plan["table_bytes"] <= 96 << 10
        entries = (plans.axis_readers if transposed else plans.axis_taps)(h, oh, mode)
        longest = max(e[1] - e[0] if transposed else e[1] for e in entries)
        assert plan["taps"][0] == max(1, longest)


def test_gate_resample_tiles_leave_the_second_reading_to_l1():
    for factor in (1, 2, 4, 8):
        for channels_last in (False, True):
            size = (128 // factor, 256 // factor)
            plan = plans.plan_gate_resample((128, 256), size, "avg", 48, channels_last=channels_last)
            assert plan["fits"]
            assert plan["region_pixels"] * 48 * 2 <= 48 << 10
            assert plan["region_pixels"] == plan["tile"][0] * plan["tile"][1] * factor**2
    assert not plans.plan_gate_resample((512, 1024), (1, 1), "nearest", 48)["fits"]


@pytest.mark.parametrize("sms", SMS)
def test_project_fills_the_gpu_before_it_saves_readings(sms):
    assert plans.plan_project(pixels=1 << 20, out_channels=192, sms=sms)["row_tiles_per_block"] == 3
    small = plans.plan_project(pixels=64, out_channels=512, sms=sms)
    assert small["blocks"] >= min(8, 3 * sms)
    assert plans.plan_project(pixels=0, out_channels=48, sms=sms)["blocks"] == 0
    assert plans.plan_project_backward(pixels=1 << 20, channels=96, sms=sms)["blocks"] == 6 * sms
    assert plans.plan_project_backward(pixels=100, channels=96, sms=sms)["blocks"] == 2


@pytest.mark.parametrize("sms", SMS)
@pytest.mark.parametrize(
    "shape", [(8, 131072, 96, 48), (1, 100, 18, 36), (64, 49, 2048, 512), (0, 0, 8, 8), (1, 1 << 34, 48, 48)], ids=str
)
def test_weight_gradient_splits_cover_every_pixel_once(shape, sms):
    batch, pixels, channels, out_channels = shape
    plan = plans.plan_weight_gradient(batch, pixels, channels, out_channels, sms)
    assert plan["split_pixels"] % 32 == 0 and plan["split_pixels"] > 0
    assert (plan["splits"] - 1) * plan["split_pixels"] < max(1, pixels) <= max(1, plan["splits"]) * plan["split_pixels"]
    assert plan["workspace_bytes"] <= max(64 << 20, 4 * batch * (channels + 1) * out_channels)


@pytest.mark.parametrize("bins", [(1,), (1, 2, 3, 6), (5, 7), (4, 4)], ids=str)
@pytest.mark.parametrize("size", [(64, 128), (13, 17), (3, 2)], ids=str)
def test_pyramid_windows_are_unions_of_cells(bins, size):
    height, width = size
    plan = plans.plan_pyramid(2, 64, height, width, list(bins))
    assert plan["fits"] and plan["total_bins"] == sum(b * b for b in bins)
    for length, cuts in ((height, plan["rows"]), (width, plan["cols"])):
        assert cuts[0] == 0 and cuts[-1] == length and cuts == sorted(set(cuts))
        for b in bins:
            for k in range(b):
                assert k * length // b in cuts and -(-(k + 1) * length // b) in cuts
    assert 1 <= plan["bands"] <= height
    assert 16 <= plan["step_pixels"] <= 64


def test_pyramids_that_do_not_fit():
    assert not plans.plan_pyramid(1, 8, 1000, 1000, [200])["fits"]
    with pytest.raises(ValueError, match="bins must have 1 to 16 entries, got 0"):
        plans.plan_pyramid(1, 8, 10, 10, [])
    with pytest.raises(ValueError, match="mode must be bilinear, avg or nearest, got 'cubic'"):
        plans.axis_taps(3, 4, "cubic")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("element_size, alignment", [(2, 16), (2, 4), (2, 2), (4, 16), (4, 4)])
@pytest.mark.parametrize(
    "batch, channels, pixels",
    [
        (8, 48, 32768),
        (2, 18, 117),
        (2, 18, 118),
        (1, 36, 2),
        (3, 130, 20),
        (1, 2048, 64),
        (1, 1, 15),
        (0, 18, 16),
        (5, 17, 9),
    ],
)
def test_strips_cover_every_element_once(batch, channels, pixels, alignment, element_size, channels_last):
    plan = plans.plan_strips(
        batch, channels, pixels, channels_last=channels_last, element_size=element_size, alignment=alignment, blocks=40
    )
    assert plan["width"] * element_size <= alignment or plan["width"] == 1
    assert plan["width"] in (16 // element_size, 4 // element_size, 1)
    row = channels * plan["fold"] if channels_last else plan["width"]
    assert plan["row_units"] * plan["width"] == (row if channels_last else pixels)
    assert plan["rows"] * row * (1 if channels_last else channels) == batch * channels * pixels
    assert plan["group_units"] * plan["pass_rows"] <= 128 and plan["group_units"] * plan["width"] <= 256
    beside = plan["groups"] * plan["group_units"] if channels_last else plan["groups"]
    assert beside - plan["group_units"] < (plan["row_units"] if channels_last else channels) <= beside
    assert plan["blocks"] * plan["span"] >= plan["rows"] > (plan["blocks"] - 1) * plan["span"] or plan["rows"] == 0
    assert plan["blocks"] * plan["groups"] <= max(40, plan["groups"])
    assert plan["fold"] == 1 or channels >= plan["width"]  # a unit has two pixels at most


def test_strips_use_wide_accesses_and_most_threads():
    """W18's and W48's branches, 8 images of 512 x 1024 at 1/4 to 1/32, in 16 bits."""
    for width in (18, 32, 48):
        for level in range(4):
            pixels = 32768 >> 2 * level
            for channels_last in (False, True):
                plan = plans.plan_strips(8, width << level, pixels, channels_last=channels_last)
                assert plan["width"] == 8
                assert plan["group_units"] * plan["pass_rows"] >= 96
                assert plan["blocks"] * plan["groups"] >= 64


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "channels, height, width", [(48, 128, 256), (18, 33, 31), (1, 1, 1), (384, 16, 32), (130, 7, 5)]
)
def test_tiles_of_a_sum(channels, height, width, channels_last):
    plan = plans.plan_sum_tile(channels, height, width, channels_last=channels_last)
    tile_height, tile_width = plan["tile"]
    assert tile_height * tile_width <= 512 and tile_width % plan["run"] == 0
    assert (channels if channels_last else width) % plan["width"] == 0
    units = channels // plan["width"] if channels_last else channels
    assert plan["group"] * plan["groups"] >= units > plan["group"] * (plan["groups"] - 1)
    assert (
        plan["group"] * (plan["width"] if channels_last else 1) <= 256
    )  # channels whose parameters are in shared memory


LIMIT = 2**31 - 65  # the longest axis


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 48, 130])
def test_addresses_have_64_bits(channels, channels_last):
    """Maps of more than 2^31 elements, which no test could allocate."""
    pixels = 1 << 30
    for image, channel, pixel in ((0, 0, 0), (7, channels - 1, pixels - 1), (1 << 20, channels // 2, pixels // 3)):
        found = plans.map_offset(image, channels, pixels, channel, pixel, channels_last)
        expected = (image * pixels + pixel) * channels + channel
        if not channels_last:
            expected = (image * channels + channel) * pixels + pixel
        assert found == expected


def test_long_rows_of_pixels_stay_below_32_bits():
    assert plans.plan_pixel_rows(8, 1 << 20, True) == (1, 8 << 20)
    assert plans.plan_pixel_rows(8, 1 << 20, False) == (8, 1 << 20)
    assert plans.plan_pixel_rows(2, 1 << 30, True) == (2, 1 << 30)  # 2^31 pixels are not one row
    assert plans.plan_pixel_rows(1 << 20, 1 << 20, True) == (1 << 20, 1 << 20)
    assert plans.plan_images_per_chunk(64, 1 << 40, 16 << 20) == 1
    assert plans.plan_images_per_chunk(64, 1 << 20, 16 << 20) == 16


def test_taps_of_the_longest_axes():
    for out in (1, 3, 7):
        for o, (start, count, first, _) in enumerate(plans.axis_taps(LIMIT, out, "avg")):
            assert (start, start + count) == (o * LIMIT // out, -(-(o + 1) * LIMIT // out))
            assert first == pytest.approx(1 / count, rel=1e-6)
        for o, (start, count, first, rest) in enumerate(plans.axis_taps(LIMIT, out, "bilinear")):
            position = max(0.0, LIMIT / out * (o + 0.5) - 0.5)
            assert start == int(position) and count == 2
            assert first + rest == 1 and rest == pytest.approx(position - start, abs=1e-6)
