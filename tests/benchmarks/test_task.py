from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gsto_benchmarks.segmentation import SegmentationTask
from gsto_benchmarks.segmentation.loss import HardPixels, segmentation_loss
from gsto_benchmarks.segmentation.metrics import class_iou, summarize
from gsto_benchmarks.segmentation.transforms import IGNORE
from gsto_benchmarks.training.optimization import poly_factor


def numpy_confusion(prediction, label, classes):
    confusion = np.zeros((classes, classes), int)
    for truth, guess in zip(label.ravel(), prediction.ravel(), strict=True):
        if truth != IGNORE:
            confusion[truth, guess] += 1
    return confusion


def test_figures_against_numpy():
    rng = np.random.default_rng(0)
    label, prediction = rng.integers(0, 5, 4000), rng.integers(0, 5, 4000)
    label[label == 3] = 0  # class 3 is never true, but predicted: its IoU is 0
    prediction = np.where(rng.random(4000) < 0.6, label, prediction)
    confusion = numpy_confusion(prediction, label, 6)  # class 5 is neither true nor predicted: absent
    ious = []
    for k in range(6):
        truth, guess = label == k, prediction == k
        ious.append((truth & guess).sum() / (truth | guess).sum() if (truth | guess).any() else np.nan)
    figures = summarize(torch.from_numpy(confusion), "ss")
    np.testing.assert_allclose(class_iou(torch.from_numpy(confusion)).numpy(), ious)
    assert figures["mIoU_ss"] == pytest.approx(np.mean(ious[:5]))
    assert figures["mIoU_ss_absent_as_zero"] == pytest.approx(np.sum(ious[:5]) / 6)
    assert figures["pixel_acc_ss"] == pytest.approx((label == prediction).mean())
    recalls = [(prediction[label == k] == k).mean() for k in (0, 1, 2, 4)]
    assert figures["mean_acc_ss"] == pytest.approx(np.mean(recalls))


def test_figures_without_labelled_pixels_are_zero():
    assert set(summarize(torch.zeros(3, 3, dtype=torch.int64), "ss").values()) == {0.0}


def test_task_counts_the_whole_set_in_one_matrix():
    torch.manual_seed(0)
    task = SegmentationTask(4).eval()
    logged = {}
    task.log_dict = lambda figures, sync_dist: logged.update(figures)
    confusion = np.zeros((4, 4), int)
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        images = torch.randn(2, 3, 40, 56, generator=rng)
        labels = torch.randint(0, 4, (2, 40, 56), generator=rng)
        labels[:, :5] = IGNORE
        with torch.no_grad():
            task.validation_step((images, labels, ["a", "b"]), seed)
            logits = F.interpolate(task.network(images), size=(40, 56), mode="bilinear", align_corners=False)
        confusion += numpy_confusion(logits.argmax(1).numpy(), labels.numpy(), 4)
    task.on_validation_epoch_end()
    expected = summarize(torch.from_numpy(confusion), "ss")
    # argmax may turn at ties within rounding, hence the tolerance of a few pixels
    assert logged == pytest.approx({f"val/{name}": value for name, value in expected.items()}, abs=2e-3)
    assert len(task.results["ss"].iou) == 4


@pytest.mark.parametrize("class_weights", [None, [1.0, 2.0, 0.5, 1.0, 4.0]])
def test_loss_against_float64(class_weights):
    torch.manual_seed(0)
    outputs = [torch.randn(2, 5, 8, 12) for _ in range(3)]
    labels = torch.randint(0, 5, (2, 30, 45))
    labels[0, :20] = IGNORE
    weight = None if class_weights is None else torch.tensor(class_weights)
    expected = 0.0
    for logits, factor in zip(outputs, (1.0, 0.5, 0.3), strict=True):
        full = F.interpolate(logits.double(), size=(30, 45), mode="bilinear", align_corners=False)
        double = None if weight is None else weight.double()
        expected += factor * F.cross_entropy(full, labels, double, ignore_index=IGNORE).item()
    loss = segmentation_loss(outputs, labels, [1.0, 0.5, 0.3], weight)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    plain = segmentation_loss(outputs[:1], labels, [1.0, 0.5, 0.3], weight)
    assert 0 < plain.item() < loss.item()


def test_loss_is_float32_under_autocast():
    outputs = [torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)]
    labels = torch.randint(0, 4, (1, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        loss = segmentation_loss(outputs, labels, [1.0])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(segmentation_loss([outputs[0].float()], labels, [1.0]).item(), rel=1e-6)


def test_all_ignored_batch_has_zero_loss_and_gradient():
    logits = torch.randn(2, 5, 8, 8, requires_grad=True)
    loss = segmentation_loss([logits], torch.full((2, 32, 32), IGNORE), [1.0])
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def hard_pixel_loss(logits, labels, threshold, min_kept, weight=None):
    """In float64 with NumPy's sort: the weighted mean over the pixels below the threshold, at least `min_kept`."""
    full = F.interpolate(logits.double(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    losses = F.cross_entropy(full, labels, ignore_index=IGNORE, reduction="none").numpy()
    labels = labels.numpy()
    probabilities = np.sort(np.exp(-losses[labels != IGNORE]))
    limit = max(threshold, probabilities[min(min_kept, len(probabilities)) - 1])
    kept = (labels != IGNORE) & (np.exp(-losses) <= limit)
    counts = kept if weight is None else kept * np.asarray(weight)[np.where(kept, labels, 0)]
    return (losses * counts).sum() / counts.sum(), kept.sum()


@pytest.mark.parametrize("class_weights", [None, [1.0, 2.0, 0.5, 1.0, 4.0]])
@pytest.mark.parametrize(
    ("threshold", "min_kept", "kept"), [(0.05, 700, 700), (0.5, 1, None), (0.05, 10_000, 1800), (1.0, 1, 1800)]
)
def test_hard_pixels(threshold, min_kept, kept, class_weights):
    torch.manual_seed(0)
    outputs = [torch.randn(2, 5, 8, 12), torch.randn(2, 5, 8, 12)]
    labels = torch.randint(0, 5, (2, 30, 45))
    labels[0, :20] = IGNORE  # 1800 stay
    weight = None if class_weights is None else torch.tensor(class_weights)
    main, count = hard_pixel_loss(outputs[0], labels, threshold, min_kept, class_weights)
    assert count == kept or (kept is None and min_kept < count < 1800)
    auxiliary = segmentation_loss(outputs[1:], labels, [0.5], weight).item()  # keeps all pixels
    loss = segmentation_loss(outputs, labels, [1.0, 0.5], weight, HardPixels(threshold, min_kept))
    assert loss.item() == pytest.approx(main + auxiliary, rel=1e-5)


def test_hard_pixels_have_all_the_gradient():
    torch.manual_seed(0)
    logits = torch.randn(1, 5, 8, 12, requires_grad=True)
    labels = torch.randint(0, 5, (1, 8, 12))
    segmentation_loss([logits], labels, [1.0], hard_pixels=HardPixels(0.01, 30)).backward()
    assert (logits.grad.abs().sum(1) > 0).sum() == 30


def test_all_ignored_batch_has_zero_loss_with_hard_pixels():
    logits = torch.randn(2, 5, 8, 8, requires_grad=True)
    loss = segmentation_loss([logits], torch.full((2, 32, 32), IGNORE), [1.0], hard_pixels=HardPixels())
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_too_few_loss_weights():
    outputs = [torch.randn(1, 2, 4, 4)] * 3
    with pytest.raises(ValueError, match=r"loss_weights.*3 outputs.*\[1\.0\]"):
        segmentation_loss(outputs, torch.zeros(1, 16, 16, dtype=torch.int64), [1.0])


def test_poly_factor():
    factors = [poly_factor(step, 100, 0.9) for step in range(101)]
    assert factors[0] == 1 and factors[100] == 0
    assert factors[50] == pytest.approx(0.5**0.9)
    assert all(a > b for a, b in pairwise(factors))
    assert poly_factor(130, 100, 0.9) == 0  # a run that was resumed with a shorter plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"lr must be > 0, got 0\.0"),
        ({"poly_power": -1.0}, r"poly_power must be > 0, got -1\.0"),
        ({"class_weights": [1.0, 2.0]}, r"class_weights must be 4 numbers > 0, got \[1\.0, 2\.0\]"),
        ({"optimizer": "lion"}, r"optimizer must be one of \('sgd', 'adam', 'adamw'\), got 'lion'"),
        ({"schedule": "cosine"}, r"schedule must be one of \('poly', 'multistep'\), got 'cosine'"),
        ({"ohem_threshold": 1.5}, r"ohem_threshold must be in \(0, 1\], got 1\.5"),
        ({"ohem_threshold": 0.9, "ohem_min_kept": 0}, "ohem_min_kept must be >= 1, got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SegmentationTask(4, **options)
