"""From images to poses by an evaluation protocol, over a data set and all processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .annotations import Annotations
from .boxes import region_of, to_image
from .codec import DECODINGS, decode
from .datasets import PersonDataset
from .keypoints import MIRRORED
from .scoring import Pose, evaluate, rescore, suppress_duplicates

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EvaluationOptions:
    """How poses are found and scored.

    Args:
        flip: average the heatmaps with those of the mirrored image.
        shift: move the mirrored image's heatmaps by one pixel before that: pixel i of a heatmap stands for pixel 4 i of the
            image, so that those of the mirrored image are 3/4 pixel off.
        decoding: "quarter" or "dark"; see `decode`.
        joint_threshold: a pose's score is its box's times the mean of the joint scores over this.
        nms: a pose with a higher object keypoint similarity than this to a better one is dropped.
        overlays: number of images to draw poses on; None: 8, and all for `gsto predict`.
        drawn_above: poses with a lower score are not drawn, nor joints with one.
        out: folder of the results; None: the command's name in trainer.default_root_dir.

    Raises:
        ValueError: an unknown decoding, or a number out of range.
    """

    flip: bool = True
    shift: bool = True
    decoding: Literal["quarter", "dark"] = "quarter"
    joint_threshold: float = 0.2
    nms: float = 0.9
    overlays: int | None = None
    drawn_above: float = 0.2
    out: str | None = None

    def __post_init__(self) -> None:
        if self.decoding not in DECODINGS:
            raise ValueError(f"evaluation.decoding must be one of {DECODINGS}, got {self.decoding!r}")
        for name in ("joint_threshold", "nms", "drawn_above"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"evaluation.{name} must be in 0 .. 1, got {getattr(self, name)}")

    def protocol(self, boxes: str) -> str:
        """The metrics' suffix: whose boxes (gt or det), then _flip, _unshifted and _dark where they apply."""
        parts = [boxes]
        parts += ["flip"] * self.flip
        parts += ["unshifted"] * (self.flip and not self.shift)
        parts += ["dark"] * (self.decoding == "dark")
        return "_".join(parts)


def find_heatmaps(network: Network, images: Tensor, flip: bool, shift: bool) -> Tensor:
    """Heatmaps (N, 17, H / 4, W / 4) float32 of images (N, 3, H, W); see `EvaluationOptions`."""
    heatmaps = network(images).float()
    if not flip:
        return heatmaps
    mirrored = network(images.flip(-1)).float().flip(-1)[:, MIRRORED]
    if shift:
        mirrored[..., 1:] = mirrored[..., :-1].clone()
    return (heatmaps + mirrored) / 2


class Evaluator:
    """Collects the poses of a data set.

    Args:
        dataset: the persons.
        options: the protocol.
        sigma: of the Gaussians that the network learned.
    """

    def __init__(self, dataset: PersonDataset, options: EvaluationOptions, sigma: float) -> None:
        self.dataset, self.options, self.sigma = dataset, options, sigma
        self.poses: list[Pose] = []

    def update(self, network: Network, images: Tensor, indices: Tensor) -> None:
        """Find the poses of a batch.

        Args:
            network: images (N, 3, H, W), normalised, -> heatmaps.
            images: (N, 3, H, W) float32.
            indices: (N,) of the persons in the data set.
        """
        self.add(find_heatmaps(network, images, self.options.flip, self.options.shift), indices)

    def add(self, heatmaps: Tensor, indices: Tensor) -> None:
        """Read the poses of persons off heatmaps (N, 17, h, w)."""
        points, scores = decode(heatmaps, self.options.decoding, self.sigma)
        size = (heatmaps.shape[-2], heatmaps.shape[-1])
        for index, found, joint_scores in zip(
            indices.tolist(), points.cpu().double().numpy(), scores.cpu().double().numpy(), strict=True
        ):
            person = self.dataset.people[index]
            region = region_of(person.box, size[1] / size[0])
            score = rescore(person.score, joint_scores, self.options.joint_threshold)
            place = to_image(found, region, size)
            self.poses.append(Pose(index, person.picture.id, place, joint_scores, person.box, region.area, score))

    def finish(self) -> list[Pose]:
        """The poses of all processes without duplicates, the same in each of them; collecting begins anew."""
        poses, self.poses = self.poses, []
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list[list[Pose]] = [[] for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(parts, poses)
            poses = [pose for part in parts for pose in part]
        poses.sort(key=lambda pose: pose.index)
        return suppress_duplicates(poses, self.options.nms)


def measure(annotations: Annotations, poses: list[Pose], protocol: str) -> dict[str, float]:
    """COCO's figures under names that say the protocol, such as AP_det_flip."""
    return {f"{name}_{protocol}": value for name, value in evaluate(annotations, poses).items()}
