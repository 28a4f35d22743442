"""Small data sets in the public layouts, with random images and labels."""

from pathlib import Path

import cv2
import numpy as np

from gsto_benchmarks.segmentation.cityscapes import LABEL_IDS


def write(file: Path, pixels) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    encoded = cv2.imencode(file.suffix, np.asarray(pixels))[1]
    encoded.tofile(file)
    return file


def blocks(rng, height, width, values):
    """A label of 8x8 blocks, and an image whose colours tell the classes apart."""
    small = rng.choice(np.asarray(values), (-(-height // 8), -(-width // 8)))
    label = small.astype(np.uint8).repeat(8, 0).repeat(8, 1)[:height, :width]
    image = np.stack([label * 37, label * 91, 255 - label], 2)  # modulo 256
    return image, label


def make_cityscapes(root: Path, counts=(("train", 3), ("val", 2), ("test", 1)), size=(64, 128)) -> Path:
    rng = np.random.default_rng(0)
    for split, count in counts:
        for index in range(count):
            name = f"town_{index:06d}_000019"
            image, label = blocks(rng, *size, LABEL_IDS)
            write(root / "leftImg8bit" / split / "town" / f"{name}_leftImg8bit.png", image)
            if split == "test":
                continue
            write(root / "gtFine" / split / "town" / f"{name}_gtFine_labelIds.png", label)
            instances = label.astype(np.uint16)
            instances[:, : size[1] // 2] = np.where(label >= 24, label.astype(np.uint16) * 1000, label)[
                :, : size[1] // 2
            ]
            write(root / "gtFine" / split / "town" / f"{name}_gtFine_instanceIds.png", instances)
    return root


def make_lip(root: Path, counts=(("train", 3), ("val", 3))) -> Path:
    rng = np.random.default_rng(0)
    for split, count in counts:
        for index in range(count):
            image, label = blocks(rng, 40 + 16 * index, 48, range(20))
            write(root / f"{split}_images" / f"{index}_1.jpg", image)
            write(root / f"{split}_segmentations" / f"{index}_1.png", label)
    return root


def make_pascal_context(root: Path, counts=(("train", 3), ("val", 2))) -> Path:
    """As `gsto prepare pascal_context` leaves it."""
    rng = np.random.default_rng(0)
    for split, count in counts:
        for index in range(count):
            image, label = blocks(rng, 64, 48 + 16 * index, range(60))
            write(root / "JPEGImages" / f"2008_{split}{index}.jpg", image)
            write(root / "context_labels" / split / f"2008_{split}{index}.png", label)
    return root


def make_camvid(root: Path, counts=(("train", 4), ("val", 2)), size=(40, 64)) -> Path:
    rng = np.random.default_rng(0)
    for split, count in counts:
        for index in range(count):
            image, label = blocks(rng, *size, range(12))
            write(root / split / f"{index}.png", image)
            write(root / f"{split}annot" / f"{index}.png", label)
    return root
