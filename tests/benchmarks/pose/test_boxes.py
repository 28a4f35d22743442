"""Boxes, regions, warping and augmentation."""

import json

import cv2
import numpy as np
import pytest

from gsto_benchmarks.pose.boxes import Region, clip_box, crop_matrix, region_of, to_image, transform_points
from gsto_benchmarks.pose.keypoints import FLIP_PAIRS, LIMBS, MIRRORED, NAMES, SIGMAS
from gsto_benchmarks.pose.transforms import Augmentation, crop, half_body, place_joints, train_sample

SIZE = (384, 288)


def test_clip_box():
    assert clip_box((10, 20, 30, 40), (100, 200)) == (10, 20, 29, 39)
    assert clip_box((-10, -5, 30, 40), (100, 200)) == (0, 0, 19, 34)
    assert clip_box((180, 80, 300, 300), (100, 200)) == (180, 80, 19, 19)
    for outside in ((200, 0, 10, 10), (-20, 0, 10, 10), (0, 100, 5, 5), (5, 5, 0, 10), (5, 5, 1, 10)):
        assert clip_box(outside, (100, 200)) is None


def test_region_has_the_aspect_and_the_margin():
    assert region_of((10, 20, 30, 80), 0.75) == Region(25, 60, 60 * 1.25, 80 * 1.25)  # widened: 80 * 0.75
    assert region_of((10, 20, 90, 80), 0.75) == Region(55, 60, 90 * 1.25, 120 * 1.25)  # heightened: 90 / 0.75


def test_crop_matrix_shows_the_region():
    region = Region(100, 80, 60, 80)
    corners = np.array([[70, 40], [130, 40], [130, 120], [100, 80]], float)
    matrix = crop_matrix(region, SIZE)
    np.testing.assert_allclose(transform_points(corners, matrix), [[0, 0], [288, 0], [288, 384], [144, 192]])
    np.testing.assert_allclose(to_image(transform_points(corners, matrix) / 4, region, (96, 72)), corners)
    mirrored = transform_points(corners, crop_matrix(region, SIZE, flip=True))
    np.testing.assert_allclose(mirrored[:, 0], 287 - transform_points(corners, matrix)[:, 0])
    # a quarter turn clockwise of the region brings what was to its right to the top
    turned = transform_points(np.array([[130.0, 80.0]]), crop_matrix(region, SIZE, rotation=90))
    np.testing.assert_allclose(turned, [[144, 192 - 144]], atol=1e-9)


def test_warped_pixels_lie_where_joints_do(person):
    image = np.zeros((200, 300, 3), np.uint8)
    someone = person((100.0, 60.0, 60.0, 80.0))
    x, y = someone.keypoints[0, :2] = (120, 90)
    cv2.circle(image, (x, y), 3, (255, 255, 255), -1)
    for flip in (False, True):
        matrix = crop_matrix(region_of(someone.box, 0.75), SIZE, rotation=30, flip=flip)
        joint = place_joints(someone.keypoints, matrix, flip)[0]
        rows, columns = np.nonzero(crop(image, matrix, SIZE)[..., 0] > 128)
        np.testing.assert_allclose([columns.mean(), rows.mean()], joint[:2], atol=0.5)


def test_a_flip_swaps_left_and_right(person):
    someone = person()
    someone.keypoints[NAMES.index("left_wrist"), 2] = 0
    matrix = crop_matrix(region_of(someone.box, 0.75), SIZE, flip=True)
    joints = place_joints(someone.keypoints, matrix, True)
    assert joints[NAMES.index("right_wrist"), 2] == 0 and joints[:, 2].sum() == 16
    expected = transform_points(someone.keypoints[NAMES.index("right_ankle"), :2], matrix)
    np.testing.assert_allclose(joints[NAMES.index("left_ankle"), :2], expected, rtol=1e-6)


def test_names_pairs_limbs():
    assert len(NAMES) == len(MIRRORED) == len(SIGMAS) == 17 and MIRRORED[0] == 0 and len(FLIP_PAIRS) == 8
    for left, right in FLIP_PAIRS:
        assert NAMES[left].removeprefix("left") == NAMES[right].removeprefix("right")
        assert MIRRORED[left] == right and MIRRORED[right] == left and SIGMAS[left] == SIGMAS[right]
    assert len(set(LIMBS)) == 19


def test_sigmas_and_skeleton_are_cocos(coco_mini):
    params = pytest.importorskip("pycocotools.cocoeval", reason="pycocotools is not installed").Params

    np.testing.assert_allclose(SIGMAS, params("keypoints").kpt_oks_sigmas)
    category = json.loads((coco_mini / "test_coco.json").read_text())["categories"][0]
    assert tuple(category["keypoints"]) == NAMES
    assert {frozenset(limb) for limb in LIMBS} == {frozenset((a - 1, b - 1)) for a, b in category["skeleton"]}


@pytest.mark.parametrize("distribution", ["paper", "hrnet"])
def test_augmentation(person, distribution):
    someone, rng = person(), np.random.default_rng(0)
    draws = [Augmentation(distribution).draw(someone, 0.75, rng) for _ in range(4000)]
    plain = region_of(someone.box, 0.75)
    scales = np.array([region.width / plain.width for region, _, _ in draws])
    rotations = np.array([rotation for _, rotation, _ in draws])
    assert {(region.x, region.y) for region, _, _ in draws} == {(plain.x, plain.y)}
    assert scales.min() >= 0.65 and scales.max() <= 1.35 and scales.mean() == pytest.approx(1, abs=0.02)
    assert np.mean([flip for *_, flip in draws]) == pytest.approx(0.5, abs=0.03)
    if distribution == "paper":
        assert np.abs(rotations).max() <= 45 and rotations.std() == pytest.approx(90 / 12**0.5, rel=0.05)
        assert scales.std() == pytest.approx(0.7 / 12**0.5, rel=0.05)
    else:
        assert np.abs(rotations).max() == 90 and np.mean(rotations == 0) == pytest.approx(0.4, abs=0.03)
        assert np.mean(np.isin(scales, (0.65, 1.35))) == pytest.approx(0.317, abs=0.03)  # normal, beyond one sigma


def test_half_body(person):
    someone, rng = person(), np.random.default_rng(0)
    regions = {half_body(someone.keypoints, 0.75, rng) for _ in range(20)}
    upper, lower = someone.keypoints[:11, :2], someone.keypoints[11:, :2]
    centers = {tuple(np.round(part.mean(0), 6)) for part in (upper, lower)}
    assert {tuple(np.round((region.x, region.y), 6)) for region in regions} == centers
    for region in regions:
        assert region.width / region.height == pytest.approx(0.75)
    someone.keypoints[8:, 2] = 0
    assert half_body(someone.keypoints, 0.75, rng) is None  # 8 joints are not more than 8


def test_an_augmented_sample_is_a_function_of_its_seed(person):
    someone, image = person(), np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)
    one, same, other = (
        train_sample(image, someone, (64, 48), Augmentation(half_body=0.5), np.random.default_rng(seed))
        for seed in (1, 1, 2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one[0], other[0]) and one[0].shape == (64, 48, 3) and one[1].shape == (17, 3)


@pytest.mark.parametrize(
    ("option", "value"), [("rotation", 181), ("scale", 1.0), ("flip", -0.1), ("half_body", 2), ("distribution", "mine")]
)
def test_augmentation_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"augmentation.{option} must be"):
        Augmentation(**{option: value})
