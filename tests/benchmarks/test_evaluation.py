"""Counting over a data set: confusion, iIoU, options; and that nothing grows with the number of images."""

import gc
import math
import shutil
import tracemalloc

import cv2
import numpy as np
import pytest
import torch
from made_data import make_cityscapes
from torch import nn

from gsto_benchmarks.errors import UsageError
from gsto_benchmarks.segmentation import CityscapesData, DataError, LIPData, PascalContextData
from gsto_benchmarks.segmentation.cityscapes import INSTANCE_SIZES, LABEL_IDS
from gsto_benchmarks.segmentation.evaluation import EvaluationOptions, Evaluator, make_evaluator
from gsto_benchmarks.segmentation.metrics import Instances, constant_prediction
from gsto_benchmarks.segmentation.protocol import Protocol, by_name
from gsto_benchmarks.segmentation.transforms import IGNORE

CLASSES = 19


class Known(nn.Module):
    """A "network" whose logits at full size say what the images' first channel holds."""

    def forward(self, images):
        return nn.functional.one_hot(images[:, 0].round().long(), CLASSES).movedim(-1, 1).float()


def as_images(*predictions):
    return torch.stack([torch.as_tensor(prediction).float().expand(3, -1, -1) for prediction in predictions])


def random_maps(rng, shape, ignored=0.1):
    label = rng.integers(0, CLASSES, shape)
    prediction = np.where(rng.random(shape) < 0.6, label, rng.integers(0, CLASSES, shape))
    return prediction, np.where(rng.random(shape) < ignored, IGNORE, label)


def count(confusion, prediction, label):
    for truth, guess in zip(label.ravel(), prediction.ravel(), strict=True):
        if truth != IGNORE:
            confusion[truth, guess] += 1


def test_one_matrix_over_images_of_all_sizes():
    rng = np.random.default_rng(0)
    evaluator = Evaluator(CLASSES, by_name(Protocol(), Protocol(flip=True)))
    expected = np.zeros((CLASSES, CLASSES), int)
    for _ in range(3):
        predictions, labels = zip(*(random_maps(rng, (12, 20)) for _ in range(2)), strict=True)
        labels = [torch.from_numpy(label) for label in labels]
        found = evaluator.update(Known(), as_images(*predictions), labels, ["a", "b"])
        assert [(p == q.numpy()).all() for p, q in zip(predictions, found["ss"], strict=True)] == [True, True]
        for prediction, label in zip(predictions, labels, strict=True):
            count(expected, prediction, label.numpy())
    results = evaluator.compute()
    assert list(results) == ["ss", "ss_flip"]
    for name, result in results.items():
        np.testing.assert_array_equal(result.confusion.numpy(), expected)
        hits = np.diag(expected)
        assert result.iou == pytest.approx(hits / (expected.sum(0) + expected.sum(1) - hits))
        assert result.accuracy == pytest.approx(hits / expected.sum(1))
        assert result.figures[f"mIoU_{name}"] == pytest.approx(np.mean(result.iou))
    evaluator.update(Known(), as_images(predictions[0]), labels[:1], ["a"])
    assert evaluator.compute()["ss"].confusion.sum() == (labels[0] != IGNORE).sum()  # counting began anew


def test_squashed_labels_are_the_nearest_pixels():
    rng = np.random.default_rng(0)
    prediction, label = random_maps(rng, (10, 10))[0], rng.integers(0, CLASSES, (20, 30))
    evaluator = Evaluator(CLASSES, by_name(Protocol(squash_label=(10, 10))))
    evaluator.update(Known(), as_images(prediction), [torch.from_numpy(label)], ["a"])
    expected = np.zeros((CLASSES, CLASSES), int)
    small = cv2.resize(label.astype(np.uint8), (10, 10), interpolation=cv2.INTER_NEAREST)
    count(expected, prediction, small)
    np.testing.assert_array_equal(evaluator.compute()["ss_squashed"].confusion.numpy(), expected)


def test_best_constant_prediction():
    confusion = torch.tensor([[5, 0, 0], [10, 10, 0], [3, 0, 2]])
    best = constant_prediction(confusion)
    assert best == pytest.approx({"class": 1, "mIoU": 20 / 30 / 3, "pixel_acc": 20 / 30})


def brute_force_instance_iou(predictions, labels, instances):
    """Pixel by pixel, after the definition."""
    hits, misses, wrong = (dict.fromkeys(INSTANCE_SIZES, 0.0) for _ in range(3))
    for prediction, label, ids in zip(predictions, labels, instances, strict=True):
        for truth, guess, number in zip(label.ravel(), prediction.ravel(), ids.ravel(), strict=True):
            if number > 1000 and number // 1000 in LABEL_IDS:
                index = LABEL_IDS.index(number // 1000)
                if index in INSTANCE_SIZES:
                    weight = INSTANCE_SIZES[index] / (ids == number).sum()
                    (hits if guess == index else misses)[index] += weight
            if truth != IGNORE and guess != truth and guess in wrong:
                wrong[guess] += 1
    iou = {}
    for index in range(CLASSES):
        total = hits[index] + misses[index] + wrong[index] if index in INSTANCE_SIZES else 0
        iou[index] = hits[index] / total if total else math.nan
    return [iou[index] for index in range(CLASSES)]


def test_instance_iou_by_brute_force():
    rng = np.random.default_rng(1)
    ids = np.array([7, 24001, 24002, 24003, 25001, 26, 26001, 28000, 28001, 33001, 33002, 29001, 34001, 65000])
    samples, protocols = [], by_name(Protocol())
    for _ in range(2):
        instances = rng.choice(ids, (4, 5)).repeat(4, 0).repeat(4, 1)
        label_id = np.where(instances > 1000, instances // 1000, instances)
        label = np.array([LABEL_IDS.index(k) if k in LABEL_IDS else IGNORE for k in label_id.ravel()])
        label = label.reshape(label_id.shape)
        prediction = np.where(rng.random(label.shape) < 0.3, rng.integers(0, 19, label.shape), label)
        samples.append((np.where(prediction == IGNORE, 3, prediction), label, instances))
    lookup = dict(zip("ab", (sample[2].astype(np.uint16) for sample in samples), strict=True))
    evaluator = Evaluator(CLASSES, protocols, (), Instances(lookup.__getitem__, INSTANCE_SIZES, LABEL_IDS))
    evaluator.update(
        Known(),
        as_images(samples[0][0], samples[1][0]),
        [torch.from_numpy(sample[1]) for sample in samples],
        ["a", "b"],
    )
    result = evaluator.compute()["ss"]
    expected = brute_force_instance_iou(*zip(*samples, strict=True))
    np.testing.assert_allclose(result.instance_iou, expected, rtol=1e-12)
    assert result.figures["iIoU_ss"] == pytest.approx(np.nanmean(expected))
    assert 0.2 < np.nanmean(expected) < 0.9


def noisy_prediction(label, seed=0):
    """Truth with a band of pixels and random blocks wrong."""
    rng = np.random.default_rng(seed)
    prediction = np.where(label == IGNORE, 2, label)
    wrong = cv2.resize(rng.random((16, 32)), label.shape[::-1], interpolation=cv2.INTER_NEAREST) < 0.3
    return np.where(wrong, rng.integers(0, 19, label.shape), prediction)


def evaluate_cityscapes(root, prediction):
    data = CityscapesData(str(root), num_workers=0)
    data.setup("validate")
    evaluator = make_evaluator(data, EvaluationOptions(), "validate")
    _, label, name = data.val_set[0]
    evaluator.update(Known(), as_images(prediction(label.numpy())), label[None].long(), [name])
    return evaluator.compute()["ss"]


def test_cityscapes_figures_by_brute_force(data_root):
    result = evaluate_cityscapes(data_root / "cityscapes_mini", noisy_prediction)
    folder = data_root / "cityscapes_mini/gtFine/val/frankfurt"
    ids, instances = (
        cv2.imread(str(folder / f"frankfurt_000000_000294_gtFine_{kind}.png"), cv2.IMREAD_UNCHANGED)
        for kind in ("labelIds", "instanceIds")
    )
    label = np.array([LABEL_IDS.index(k) if k in LABEL_IDS else IGNORE for k in ids.ravel()]).reshape(ids.shape)
    expected = brute_force_instance_iou([noisy_prediction(label)], [label], [instances.astype(int)])
    np.testing.assert_allclose(result.instance_iou, expected, rtol=1e-12)


def test_cityscapes_figures_against_the_benchmarks_own_script(data_root, tmp_path, monkeypatch, capsys):
    """The official evaluation, with np.in1d, which NumPy 2.4 removed, given back to it."""
    monkeypatch.setattr(np, "in1d", lambda a, b, invert=False: np.isin(a, b, invert=invert).ravel(), raising=False)
    official = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", reason="cityscapesScripts is not installed"
    )
    result = evaluate_cityscapes(data_root / "cityscapes_mini", noisy_prediction)
    truth = tmp_path / "frankfurt_000000_000294_gtFine_labelIds.png"
    folder = data_root / "cityscapes_mini/gtFine/val/frankfurt"
    for kind in ("labelIds", "instanceIds"):
        shutil.copy(folder / f"frankfurt_000000_000294_gtFine_{kind}.png", tmp_path)
    ids = cv2.imread(str(truth), cv2.IMREAD_UNCHANGED)
    label = np.array([LABEL_IDS.index(k) if k in LABEL_IDS else IGNORE for k in ids.ravel()]).reshape(ids.shape)
    prediction = np.array(LABEL_IDS, np.uint8)[noisy_prediction(label)]
    file = tmp_path / "frankfurt_000000_000294_pred.png"
    cv2.imwrite(str(file), prediction)
    monkeypatch.setattr(official.args, "quiet", True)
    monkeypatch.setattr(official.args, "JSONOutput", False)
    figures = official.evaluateImgLists([str(file)], [str(truth)], official.args)
    assert result.figures["mIoU_ss"] == pytest.approx(figures["averageScoreClasses"], rel=1e-12)
    assert result.figures["iIoU_ss"] == pytest.approx(figures["averageScoreInstClasses"], rel=1e-12)
    for index, name in enumerate(CityscapesData.class_names):
        for ours, theirs in ((result.iou, "classScores"), (result.instance_iou, "classInstScores")):
            assert ours[index] == pytest.approx(figures[theirs][name], rel=1e-12, nan_ok=True)


def test_missing_instance_ids_are_named(tmp_path):
    root = make_cityscapes(tmp_path)
    for file in root.rglob("*_instanceIds.png"):
        file.unlink()
    with pytest.raises(DataError, match=r"_gtFine_instanceIds\.png: cannot be read"):
        evaluate_cityscapes(root, noisy_prediction)


def test_choosing_protocols():
    offered = CityscapesData.protocols
    assert list(EvaluationOptions().choose(offered)) == ["ss"]
    (protocol,) = EvaluationOptions(protocols=["ms_flip"], fuse="exp", scales=[0.5, 1.0]).choose(offered).values()
    assert protocol.name == "ms_flip_exp" and protocol.scales == (0.5, 1.0)
    assert protocol.window == (1024, 2048) and protocol.window_above == 1.0
    with pytest.raises(UsageError, match="there is no 'ms' here; there are ss, ss_flip, ms_flip"):
        EvaluationOptions(protocols=["ms"]).choose(offered)
    with pytest.raises(UsageError, match=r"evaluation: scales must be .* got \[-1\.0\]"):
        EvaluationOptions(scales=[-1.0]).choose(offered)


def test_published_protocols():
    """Section 4 of the paper and HRNet's code."""
    scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    city, lip, context = CityscapesData.protocols, LIPData.protocols, PascalContextData.protocols
    assert city["ms_flip"] == Protocol(scales, flip=True, window=(1024, 2048), window_above=1.0)
    assert lip["ss_flip"] == Protocol(flip=True) and LIPData.squash == (473, 473)
    windows = {"long_side": 520, "window": (480, 480), "stride": (320, 320)}
    assert context["ss"] == Protocol(**windows)
    assert context["ms_flip"] == Protocol((*scales, 2.0), flip=True, **windows)


def test_training_needs_the_metric_that_chooses_the_best():
    data = LIPData("x")
    assert list(make_evaluator(data, EvaluationOptions(), "fit").protocols) == ["ss"]
    with pytest.raises(UsageError, match=r"chooses best\.ckpt by mIoU_ss, but the protocols are ss_flip"):
        make_evaluator(data, EvaluationOptions(protocols=["ss_flip"]), "fit")


def held():
    """Bytes of all tensors that are alive, and of what Python and NumPy hold."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    # Other tests may have left tensors without memory of this kind.
    tensors = [tensor for tensor in tensors if tensor.layout == torch.strided and tensor.device.type == "cpu"]
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values()), tracemalloc.get_traced_memory()[0]


def test_memory_does_not_grow_with_the_number_of_images():
    rng = np.random.default_rng(0)
    instances = rng.choice([7, 24001, 26002], (64, 96)).astype(np.uint16)
    evaluator = Evaluator(
        CLASSES,
        by_name(Protocol(), Protocol((0.5, 1.0), flip=True)),
        (),
        Instances(lambda name: instances, INSTANCE_SIZES, LABEL_IDS),
    )
    sizes = []
    tracemalloc.start()
    try:
        for index in range(41):
            prediction, label = random_maps(rng, (64, 96))
            evaluator.update(Known(), as_images(prediction), torch.from_numpy(label)[None], [str(index)])
            if index in (10, 40):
                sizes.append(held())
    finally:
        tracemalloc.stop()
    (tensors, traced), (tensors_later, traced_later) = sizes
    image = 64 * 96  # 30 of them, kept as one byte per pixel, would be 184 kB
    assert tensors_later == tensors
    assert traced_later - traced < 5 * image
