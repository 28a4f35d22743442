"""The canvas that the embedded scenes are painted on: a pinhole camera, and layers that become a photograph."""

from __future__ import annotations

import cv2
import numpy as np

OVERSAMPLE = 2  # scenes are painted at twice the size, then reduced: edges are smooth and thin poles are never broken
_SHIFT = 4  # OpenCV draws with 1/16 pixel coordinates


class Canvas:
    """A camera with random position, and the layers colour, label and roughness that shapes are painted into.

    A painter sets `sky` (the colour of distant things, RGB) and `haze` (metres) before the first shape.
    """

    sky: np.ndarray
    haze: float

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, height, width
        self.focal = width * rng.uniform(0.85, 1.2)
        self.horizon = height * rng.uniform(0.40, 0.55)
        self.center = width * rng.uniform(0.35, 0.65)
        self.eye = rng.uniform(1.3, 2.1)  # metres above the road
        self.color = np.zeros((height, width, 3), np.float32)
        self.label = np.zeros((height, width), np.uint8)
        self.rough = np.zeros((height, width), np.float32)

    def u(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Metres right of the camera, above the road, and ahead -> pixels."""
        return self.center + self.focal * x / z, self.horizon + self.focal * (self.eye - y) / z

    def fill(self, points: list, color: np.ndarray, label: int | None, rough: float = 0.1, z: float = 1.0) -> None:
        """Paint a polygon given in metres (x, y, z); `label=None` changes the colour only (windows, markings)."""
        pixels = np.clip([self.project(*p) for p in points], -8000, 8000)
        self.fill_pixels(pixels, self.hazed(color, z), label, rough)

    def fill_pixels(self, pixels: np.ndarray, color: np.ndarray, label: int | None, rough: float) -> None:
        corners = [np.round(np.asarray(pixels) * 2**_SHIFT).astype(np.int32)]
        cv2.fillPoly(self.color, corners, tuple(map(float, color)), cv2.LINE_8, _SHIFT)
        if label is not None:
            cv2.fillPoly(self.label, corners, label, cv2.LINE_8, _SHIFT)
            cv2.fillPoly(self.rough, corners, rough, cv2.LINE_8, _SHIFT)

    def disc(self, x: float, y: float, z: float, radius: float, color, label, rough=0.1, squeeze: float = 1.0) -> None:
        """Paint an upright ellipse with `radius` metres of height and `squeeze * radius` of width."""
        angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        column, row = self.project(x, y, z)
        size = self.focal * radius / z
        pixels = np.stack([column + squeeze * size * np.cos(angle), row + size * np.sin(angle)], 1)
        self.fill_pixels(pixels, self.hazed(color, z), label, rough)

    def upright(self, x: float, z: float, low: float, high: float, width: float, color, label, rough=0.1) -> None:
        """Paint an upright rectangle that faces the camera; never thinner than one pixel of the final image."""
        half = max(width / 2, 0.5 * OVERSAMPLE * z / self.focal)
        self.fill(
            [(x - half, low, z), (x + half, low, z), (x + half, high, z), (x - half, high, z)], color, label, rough, z
        )

    def hazed(self, color: np.ndarray, z: float) -> np.ndarray:
        return self.sky + (np.asarray(color) - self.sky) * np.exp(-z / self.haze)

    def darken(self, points: list, factor: float) -> None:
        mask = np.zeros((self.height, self.width), np.uint8)
        pixels = np.clip([self.project(*p) for p in points], -8000, 8000)
        cv2.fillPoly(mask, [np.round(pixels * 2**_SHIFT).astype(np.int32)], 1, cv2.LINE_8, _SHIFT)
        self.color[mask > 0] *= factor

    def develop(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        rng, (height, width) = self.rng, size
        fine = rng.normal(0, 1, (self.height, self.width)).astype(np.float32)
        coarse = rng.normal(0, 1, (self.height // 6 + 1, self.width // 6 + 1)).astype(np.float32)
        coarse = cv2.resize(coarse, (self.width, self.height), interpolation=cv2.INTER_CUBIC)
        image = self.color * (1 + self.rough * (0.7 * fine + 0.7 * coarse))[..., None]
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        blur = self.u(0, 0.7)
        if blur > 0.3:
            image = cv2.GaussianBlur(image, (0, 0), blur)
        gamma, gain = self.u(0.75, 1.35), self.u(0.65, 1.2)
        cast = np.array([self.u(0.9, 1.1), 1.0, self.u(0.88, 1.12)], np.float32)
        image = 255 * gain * cast * (np.clip(image, 0, 255) / 255) ** gamma
        image = image + rng.normal(0, self.u(2, 9), image.shape)
        label = self.label[OVERSAMPLE // 2 :: OVERSAMPLE, OVERSAMPLE // 2 :: OVERSAMPLE]
        return np.clip(image, 0, 255).astype(np.uint8), np.ascontiguousarray(label)
