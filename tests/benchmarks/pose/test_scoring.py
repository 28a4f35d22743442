"""Rescoring, duplicates and COCO's figures."""

import math

import numpy as np
import pytest

from gsto_benchmarks.errors import UsageError
from gsto_benchmarks.pose.annotations import read_annotations
from gsto_benchmarks.pose.keypoints import SIGMAS
from gsto_benchmarks.pose.scoring import (
    EVALUATORS,
    FIGURES,
    Pose,
    evaluate,
    evaluator_name,
    oks,
    rescore,
    suppress_duplicates,
)


def pose(points, score, image_id=1, area=5000.0, index=0):
    return Pose(index, image_id, np.asarray(points, float), np.ones(17), (0, 0, 50, 100), area, score)


def test_rescore():
    scores = np.array([0.1, 0.2, 0.3, 0.9])
    assert rescore(0.5, scores, 0.2) == pytest.approx(0.5 * 0.6)
    assert rescore(0.5, scores, 0.9) == 0.0


def test_oks_by_its_formula():
    rng = np.random.default_rng(0)
    mine, others, areas = 100 * rng.random((17, 2)), 100 * rng.random((3, 17, 2)), np.array([900.0, 2000.0, 1e4])
    found = oks(mine, 5000.0, others, areas)
    for value, other, area in zip(found, others, areas, strict=True):
        terms = [
            math.exp(-((a - b) ** 2).sum() / (2 * (5000 + area) / 2 * (2 * sigma) ** 2))
            for a, b, sigma in zip(mine, other, SIGMAS, strict=True)
        ]
        assert value == pytest.approx(sum(terms) / 17, rel=1e-9)
    assert oks(mine, 10.0, mine[None], np.array([10.0]))[0] == pytest.approx(1)


def test_duplicates_of_a_better_pose_go():
    points = 100 * np.random.default_rng(0).random((17, 2))
    near, far = points + 0.5, points + 30
    poses = [pose(near, 0.5), pose(points, 0.9), pose(far, 0.4), pose(points, 0.3, image_id=2)]
    assert sorted(p.score for p in suppress_duplicates(poses, 0.9)) == [0.3, 0.4, 0.9]
    assert len(suppress_duplicates(poses, 1.0)) == 4
    # what was dropped drops nobody: c is near b only, b near a
    chain = [pose(points + step, score) for step, score in ((0, 0.9), (4, 0.8), (8, 0.7))]
    similarity = oks(chain[0].points, 5000, np.array([p.points for p in chain]), np.full(3, 5000.0))
    between = float(similarity[1:].mean())
    assert similarity[2] < between < similarity[1]
    assert [p.score for p in suppress_duplicates(chain, between)] == [0.9, 0.7]


def implementation_or_skip(name):
    pytest.importorskip(EVALUATORS[name], reason=f"{name} is not installed")
    return name


@pytest.mark.parametrize("implementation", EVALUATORS)
def test_figures_of_a_wrong_and_of_a_perfect_pose(write_coco, implementation):
    implementation_or_skip(implementation)

    def large(content):
        for entry in content["annotations"]:
            entry["area"] = 20_000.0

    root = write_coco(change=large)
    annotations = read_annotations(root / "annotations/person_keypoints_val2017.json", root / "images/val2017")
    perfect = [pose(p.keypoints[:, :2], 0.9, p.picture.id, index=i) for i, p in enumerate(annotations.people)]
    figures = evaluate(annotations, perfect, implementation)
    assert set(figures) == set(FIGURES) - {"APM", "ARM"}  # there is nobody of medium size
    assert set(figures.values()) == {1.0}
    # one of two found, and found first: precision 1 up to recall 0.5, which is 51 of COCO's 101 places
    assert evaluate(annotations, perfect[:1], implementation)["AP"] == pytest.approx(51 / 101)
    # a better-scored false alarm before it halves that
    alarm = pose(np.full((17, 2), 5.0), 0.95, annotations.people[0].picture.id)
    assert evaluate(annotations, [alarm, *perfect[:1]], implementation)["AP"] == pytest.approx(51 / 202)
    assert evaluate(annotations, [], implementation) == dict.fromkeys(FIGURES, 0.0)


@pytest.mark.parametrize("implementation", EVALUATORS)
@pytest.mark.parametrize("number", [0, 7])
def test_annotation_ids_do_not_matter(write_coco, implementation, number):
    """COCOeval takes a match with annotation 0 for none, and one of several annotations of one id for all of them."""
    implementation_or_skip(implementation)

    def same(content):
        for entry in content["annotations"]:
            entry["id"] = number

    root = write_coco(people=4, change=same)
    annotations = read_annotations(root / "annotations/person_keypoints_val2017.json", root / "images/val2017")
    perfect = [pose(p.keypoints[:, :2], 0.9, p.picture.id, index=i) for i, p in enumerate(annotations.people)]
    assert evaluate(annotations, perfect, implementation)["AP"] == 1.0


def test_a_run_without_any_evaluator_does_not_begin(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="need pycocotools or faster-coco-eval"):
        evaluator_name()


def test_result_entry():
    entry = pose(np.arange(34).reshape(17, 2) / 3, 0.123).coco()
    assert (entry["image_id"], entry["category_id"], entry["score"]) == (1, 1, 0.123)
    assert len(entry["keypoints"]) == 51 and entry["keypoints"][:6] == [0.0, 0.333, 1.0, 0.667, 1.0, 1.0]
