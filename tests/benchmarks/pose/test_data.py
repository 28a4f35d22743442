"""COCO's files: what is taken from them, and what stops a run before it starts."""

import json

import cv2
import numpy as np
import pytest
import torch

from gsto_benchmarks.errors import DataError
from gsto_benchmarks.pose import Augmentation, CocoData, EvaluationOptions, Split
from gsto_benchmarks.pose.boxes import crop_matrix, region_of
from gsto_benchmarks.pose.codec import encode
from gsto_benchmarks.pose.evaluation import Evaluator, find_heatmaps, measure
from gsto_benchmarks.pose.keypoints import MIRRORED
from gsto_benchmarks.pose.transforms import place_joints
from gsto_benchmarks.sampling import Draw

MINI = Split("test_coco.json", ".", "test_coco_det_AP_H_56.json")


def open_data(root, stage, split=None, **options):
    options = {"batch_size": 1, "num_workers": 0, "input_size": (64, 48)} | options
    split = split or Split("annotations/person_keypoints_val2017.json", "images/val2017", "boxes.json")
    data = CocoData(str(root), train=split, val=split, **options)
    data.setup(stage)
    return data


def write_boxes(root, *boxes, **changes):
    entries = [{"image_id": 10, "category_id": 1, "bbox": box, "score": 0.5} | changes for box in boxes]
    (root / "boxes.json").write_text(json.dumps(entries))


def true_heatmaps(dataset, sigma):
    height, width = dataset.size
    matrices = [crop_matrix(region_of(p.box, width / height), dataset.size) for p in dataset.people]
    joints = [place_joints(p.keypoints, m, False) for p, m in zip(dataset.people, matrices, strict=True)]
    return encode(torch.from_numpy(np.array(joints)), (height // 4, width // 4), sigma)[0]


@pytest.mark.parametrize(("size", "sigma"), [((384, 288), 3), ((256, 192), 2)])
@pytest.mark.parametrize("decoding", ["quarter", "dark"])
def test_the_truth_through_heatmaps_gives_ap_1(coco_mini, size, sigma, decoding):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    data = open_data(coco_mini, "fit", MINI, input_size=size)
    evaluator = Evaluator(data.val_set, EvaluationOptions(decoding=decoding), sigma)
    evaluator.add(true_heatmaps(data.val_set, sigma), torch.arange(len(data.val_set)))
    figures = measure(data.val_annotations, evaluator.finish(), "gt")
    assert set(figures.values()) == {1.0} and figures["AP_gt"] == 1.0 and len(figures) == 10


def test_coco_mini_has_12_persons_and_118_boxes(coco_mini):
    data = open_data(coco_mini, "fit", MINI)
    assert (len(data.train_set), len(data.val_set), data.evaluated_boxes) == (12, 12, "gt")
    assert dict(data.val_annotations.skipped) == {"no keypoints": 2}
    data = open_data(coco_mini, "validate", MINI)
    assert (len(data.val_set), data.evaluated_boxes) == (118, "det")
    data = open_data(coco_mini, "validate", MINI, boxes="ground_truth")
    assert (len(data.val_set), data.evaluated_boxes) == (12, "gt")


def test_samples(coco_mini):
    data = open_data(coco_mini, "fit", MINI, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (4, 64, 48, 3) and batch.image.dtype == torch.uint8
    assert batch.joints.shape == (4, 17, 3) and len(batch.name) == 4
    assert data.on_after_batch_transfer(batch).image.shape == (4, 3, 64, 48)
    batch = next(iter(data.val_dataloader()))
    assert batch.index.tolist() == list(range(12)) and batch.name[0] == "000000000785.jpg#0"
    one, same, other = (data.train_set[Draw(3, seed)] for seed in (5, 5, 6))
    assert torch.equal(one.image, same.image) and torch.equal(one.joints, same.joints)
    assert not torch.equal(one.joints, other.joints)


def test_traps_in_annotations(write_coco):
    def change(content):
        crowd, no_area, absent, no_joints, no_keys, outside, good = content["annotations"]
        crowd["iscrowd"] = 1
        no_area["area"] = 0
        del absent["area"], no_keys["num_keypoints"], no_keys["iscrowd"]
        no_joints["keypoints"] = [0] * 51
        outside["bbox"] = [130, 10, 50, 50]
        good["bbox"] = [-10, 20, 1000, 1000]

    data = open_data(write_coco(7, change, images=3), "fit", boxes="ground_truth")
    assert data.val_annotations.skipped == {"crowd": 1, "area 0": 2, "no keypoints": 1, "box outside the image": 1}
    assert [person.box for person in data.train_set.people] == [(10, 10, 79, 79), (0, 20, 127, 75)]
    assert len(data.val_annotations.records) == 7  # COCOeval itself leaves out crowds and persons without keypoints
    assert len({record["id"] for record in data.val_annotations.records} | {0}) == 8


def test_boxes_of_detectors(write_coco):
    root = write_coco(1)
    write_boxes(root, [10, 10, 20, 20], [-5, -5, 30, 30], [200, 10, 5, 5])
    data = open_data(root, "validate")
    assert [person.box for person in data.val_set.people] == [(10, 10, 20, 20), (-5, -5, 30, 30)]  # as they are
    assert data.val_set.people[0].score == 0.5 and data.val_set.people[0].keypoints is None
    assert data.val_set[1].image.shape == (64, 48, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"].clear(), r"annotations\[0\]: there is no image with the id 10 in the file"),
        (lambda c: c["images"][1].update(id=10), r"images\[1\]: image id 10 is there twice"),
        (lambda c: c["images"][0].update(height="96"), r"images\[0\]: height must be an integer, got '96'"),
        (lambda c: c["images"][0].pop("file_name"), r"images\[0\]: has no file_name"),
        (lambda c: c.pop("images"), 'must be a JSON object with a list "images"'),
        (
            lambda c: c["annotations"][1].update(keypoints=[1, 2]),
            r"annotations\[1\]: keypoints must be 51 finite numbers",
        ),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, "a", 4]), r"annotations\[1\]: bbox must be 4 finite numbers"),
        (
            lambda c: c["annotations"][1].update(image_id=[10]),
            r"annotations\[1\]: image_id must be an integer, got \[10\]",
        ),
        (lambda c: c["annotations"][1].update(area=None), r"annotations\[1\]: area must be a number, got None"),
        (lambda c: c["annotations"].clear(), r"no person with keypoints in it \(skipped: none\)"),
        (lambda c: [a.update(iscrowd=1) for a in c["annotations"]], r"no person .* \(skipped: 2 crowd\)"),
        (lambda c: c["images"][1].update(file_name="gone.jpg"), "gone.jpg: no such image"),
    ],
)
def test_bad_annotations_are_named(write_coco, change, message):
    with pytest.raises(DataError, match=message):
        open_data(write_coco(2, change), "fit")


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "boxes.json: not valid JSON"),
        ("{}", "boxes.json: must be a JSON list of boxes"),
        ("[]", "boxes.json: no box of a person in it"),
        ('[{"image_id": 10, "bbox": [0, 0, 9, 9], "score": 1}]', "boxes.json, entry 0: has no category_id"),
        (
            '[{"image_id": 785, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 1}]',
            r"1 of 1 boxes are of images that .*val2017.json does not list, such as image_id 785: is this the detector file "
            "of another split",
        ),
        (
            '[{"image_id": 10, "category_id": 1, "bbox": [0, 0, 9, 9], "score": null}]',
            "entry 0: score must be a number",
        ),
    ],
)
def test_bad_detections_are_named_before_training(write_coco, stage, content, message):
    root = write_coco()
    (root / "boxes.json").write_text(content)
    with pytest.raises(DataError, match=message):
        open_data(root, stage)


def test_missing_files_are_named(write_coco, tmp_path):
    with pytest.raises(DataError, match=r"person_keypoints_train2017.json: cannot be read: No such file"):
        CocoData(str(tmp_path)).setup("fit")
    for stage in ("fit", "validate"):
        with pytest.raises(DataError, match=r"boxes.json: cannot be read"):
            open_data(write_coco(), stage)
    with pytest.raises(DataError, match=r"gsto predict needs --data.images FOLDER"):
        open_data(tmp_path, "predict")


def test_an_image_of_another_size_than_annotated(write_coco):
    data = open_data(write_coco(change=lambda c: c["images"][1].update(width=200)), "fit", boxes="ground_truth")
    assert data.val_set[0].name == "000000000000.jpg#0"
    with pytest.raises(DataError, match=r"000000000001.jpg: the image is 96x128 instead of 96x200"):
        data.val_set[1]


def test_published_layouts(write_coco, tmp_path):
    root = write_coco()
    data = CocoData(str(root), boxes="ground_truth", num_workers=0)
    data.setup("validate")
    (root / "images" / "val2017").rename(root / "val2017")
    data.setup("validate")
    assert data.val_set.people[0].picture.file == root / "val2017" / "000000000000.jpg"
    assert data.detections_file("val").name == "COCO_val2017_detections_AP_H_56_person.json"
    assert data.detections_file("test").name == "COCO_test-dev2017_detections_AP_H_609_person.json"
    assert data.count_train_images()[0] == 149_813 and "as published" in data.count_train_images()[1]


def test_images_to_predict(tmp_path):
    for name, size in (("a.jpg", (40, 60)), ("b.png", (50, 30))):
        cv2.imwrite(str(tmp_path / name), np.zeros((*size, 3), np.uint8))
    whole = open_data(tmp_path, "predict", images=str(tmp_path)).predict_set
    assert [person.box for person in whole.people] == [(0, 0, 60, 40), (0, 0, 30, 50)]
    file = tmp_path / "boxes.json"
    boxes = [{"file_name": "b.png", "bbox": [1, 2, 10, 20]}, {"file_name": "b.png", "bbox": [5, 5, 9, 9], "score": 0.3}]
    file.write_text(json.dumps(boxes))
    given = open_data(tmp_path, "predict", images=str(tmp_path), image_boxes=str(file)).predict_set
    assert [(person.box, person.score) for person in given.people] == [((1, 2, 10, 20), 1), ((5, 5, 9, 9), 0.3)]
    for box, message in (
        ({"file_name": "c.png", "bbox": [1, 2, 3, 4]}, "there is no image 'c.png'"),
        ({"file_name": "a.jpg", "bbox": [70, 2, 9, 9]}, "is outside the image of"),
        ({"bbox": [70, 2, 9, 9]}, "entry 0: has no file_name"),
    ):
        file.write_text(json.dumps([box]))
        with pytest.raises(DataError, match=message):
            open_data(tmp_path, "predict", images=str(tmp_path), image_boxes=str(file))


def test_bad_options():
    with pytest.raises(ValueError, match=r"input_size must be \(height, width\), multiples of 4, got \(384, 290\)"):
        CocoData(input_size=(384, 290))
    with pytest.raises(ValueError, match="boxes must be 'detector' or 'ground_truth', got 'mine'"):
        CocoData(boxes="mine")
    with pytest.raises(ValueError, match=r"evaluation.nms must be in 0 .. 1, got 2"):
        EvaluationOptions(nms=2)
    with pytest.raises(ValueError, match=r"evaluation.decoding must be one of"):
        EvaluationOptions(decoding="mean")
    assert Augmentation().half_body == 0


def test_protocol_names():
    assert EvaluationOptions().protocol("det") == "det_flip"
    assert EvaluationOptions(flip=False, shift=False).protocol("gt") == "gt"
    assert EvaluationOptions(shift=False, decoding="dark").protocol("gt") == "gt_flip_unshifted_dark"


def test_flip_test_averages_with_the_mirrored_image():
    """A 'network' that is its input at every fourth pixel: the mirrored maps are 3/4 pixel off, after the shift 1/4."""
    image = torch.rand(1, 17, 32, 32)

    def network(images):
        return images[..., ::4, ::4]

    plain = find_heatmaps(network, image, flip=False, shift=True)
    assert torch.equal(plain, image[..., ::4, ::4])
    # pixel i of the mirrored image's map, turned back, is the image at 31 - 4 * (7 - i) = 4 i + 3
    mirrored = image[..., ::4, 3::4][:, MIRRORED]
    torch.testing.assert_close(find_heatmaps(network, image, True, False), (plain + mirrored) / 2)
    shifted = torch.cat([mirrored[..., :1], mirrored[..., :-1]], -1)  # at 4 i - 1
    torch.testing.assert_close(find_heatmaps(network, image, True, True), (plain + shifted) / 2)
