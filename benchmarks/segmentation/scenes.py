"""Embedded street scenes: endless labelled images from (seed, index), with no download.

A pinhole camera looks down a street built in metres, and shapes are painted from far to near, so perspective, scale and
occlusion come out right: large areas (sky, road, sidewalk, building, vegetation), medium cars, small people, traffic
lights and signs, and poles one to three pixels wide. Colours are drawn per object from overlapping ranges (grey walls,
grey roads, green cars, overcast skies), so colour alone does not solve them.
"""

from __future__ import annotations

import numpy as np

from .canvas import OVERSAMPLE, Canvas

CLASSES = (
    "sky",
    "building",
    "road",
    "sidewalk",
    "vegetation",
    "car",
    "person",
    "pole",
    "traffic light",
    "traffic sign",
)
PALETTE = (
    (70, 130, 180),
    (70, 70, 70),
    (128, 64, 128),
    (244, 35, 232),
    (107, 142, 35),
    (0, 0, 142),
    (220, 20, 60),
    (190, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
)
IGNORE = 255
SKY, BUILDING, ROAD, SIDEWALK, VEGETATION, CAR, PERSON, POLE, LIGHT, SIGN = range(len(CLASSES))


def make_scene(index: int, *, seed: int = 0, size: tuple[int, int] = (128, 256)) -> tuple[np.ndarray, np.ndarray]:
    """Paint scene `index` of the series `seed`.

    Args:
        index: number of the scene, >= 0.
        seed: number of the series, >= 0. The same (seed, index, size) always gives the same scene.
        size: (height, width) in pixels, each >= 32.

    Returns:
        image (H, W, 3) uint8 RGB and label (H, W) uint8 with values 0..9 (`CLASSES`) or 255 (own bonnet: ignored).

    Raises:
        ValueError: negative `index` or `seed`, or a side of `size` under 32.
    """
    if index < 0 or seed < 0:
        raise ValueError(f"index and seed must be >= 0, got index={index}, seed={seed}")
    if len(size) != 2 or min(size) < 32:
        raise ValueError(f"size must be (height, width) with both >= 32, got {tuple(size)}")
    rng = np.random.default_rng([seed, index])
    street = _Street(rng, size[0] * OVERSAMPLE, size[1] * OVERSAMPLE)
    street.paint()
    return street.develop(size)


class _Street(Canvas):
    """One scene while it is painted: the layout of a street, drawn at random, and what stands on it."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        super().__init__(rng, height, width)
        self.left, self.right = -rng.uniform(3.5, 7.5), rng.uniform(3.5, 7.5)
        self.walk = rng.uniform(2.5, 5.0)
        self.sun = rng.uniform(0.55, 1.0, size=2)  # brightness of the left and of the right side of the street
        grey = rng.uniform(130, 235)
        blue = np.array([rng.uniform(70, 160), rng.uniform(130, 190), rng.uniform(190, 245)])
        self.sky = blue + (grey - blue) * rng.choice([0.0, rng.uniform(0.3, 1.0)])
        self.haze = rng.uniform(80, 400)  # metres
        self.label[:] = SKY

    def paint(self) -> None:
        self.paint_sky()
        self.paint_ground()
        things = []  # (distance, painter, arguments): painted from far to near
        for side in (-1, 1):
            things += self.place_blocks(side)
            things += self.place_furniture(side)
            things += self.place_parked_cars(side)
        things += self.place_traffic()
        for _, painter, arguments in sorted(things, key=lambda thing: -thing[0]):
            painter(*arguments)
        if self.rng.random() < 0.3:  # the bonnet of the own car, as in real street data: not evaluated
            self.paint_bonnet()

    # ---- areas

    def paint_sky(self) -> None:
        slope = np.linspace(self.u(0.75, 1.0), self.u(0.95, 1.15), self.height, dtype=np.float32)
        self.color[:] = slope[:, None, None] * self.sky.astype(np.float32)
        for _ in range(self.rng.integers(0, 7)):
            column, row = self.u(0, self.width), self.u(0, self.horizon)
            axes = (self.width * self.u(0.04, 0.2), self.height * self.u(0.01, 0.06))
            angle = np.linspace(0, 2 * np.pi, 24)
            pixels = np.stack([column + axes[0] * np.cos(angle), row + axes[1] * np.sin(angle)], 1)
            self.fill_pixels(pixels, self.sky + (self.u(190, 255) - self.sky) * self.u(0.2, 0.8), None, 0.0)
        self.rough[:] = 0.02
        x = -260.0
        while x < 260:  # the far skyline: blocks and trees without detail
            width, height = self.u(8, 40), self.u(2, 26)
            tree = self.rng.random() < 0.4
            color = self.green() if tree else self.wall()
            corners = [(x, -2, 150), (x + width, -2, 150), (x + width, height, 150), (x, height, 150)]
            self.fill(corners, color * 0.8, VEGETATION if tree else BUILDING, 0.25 if tree else 0.1, 150)
            x += width * self.u(0.7, 1.3)

    def strip(self, x0: float, x1: float, color: np.ndarray, label: int | None, rough: float, z0=0.7, z1=150.0) -> None:
        self.fill([(x0, 0, z0), (x1, 0, z0), (x1, 0, z1), (x0, 0, z1)], color, label, rough, 8.0)

    def paint_ground(self) -> None:
        asphalt = self.u(55, 150) * np.array([1.0, self.u(0.97, 1.03), self.u(0.94, 1.08)])
        paving = self.u(85, 190) * np.array([1.0, self.u(0.92, 1.0), self.u(0.80, 1.0)])
        for side, edge in ((-1, self.left), (1, self.right)):
            bright = self.sun[(side + 1) // 2] * 0.4 + 0.6
            if self.rng.random() < 0.5:
                self.strip(edge, side * 400, self.green() * bright, VEGETATION, 0.3)
            else:
                self.strip(edge, side * 400, paving * 0.95 * bright, SIDEWALK, 0.12)
            self.strip(edge, edge + side * self.walk, paving * bright, SIDEWALK, 0.12)
        self.strip(self.left, self.right, asphalt, ROAD, 0.12)
        for _ in range(self.rng.integers(0, 4)):  # repaired patches
            x, z = self.u(self.left, self.right - 1.5), self.u(2.5, 25)
            self.strip(x, x + self.u(0.5, 1.5), asphalt * self.u(0.75, 1.2), None, 0.1, z, z + self.u(1, 8))
        shade = int(np.argmin(self.sun))  # one side of the street lies in the shadow of its houses
        edge = (self.left, self.right)[shade]
        reach = edge + (1, -1)[shade] * self.u(0, 5)
        self.darken([(edge * 3, 0, 0.7), (reach, 0, 0.7), (reach, 0, 150), (edge * 3, 0, 150)], self.u(0.55, 0.9))
        paint = self.u(170, 245) * np.array([1.0, 1.0, self.u(0.7, 1.0)])
        for x in self.rng.choice([self.left * 0.5, 0.0, self.right * 0.5], self.rng.integers(0, 4)):
            z, dash = self.u(1, 4), self.u(2, 6)
            while z < 70:
                self.strip(x - 0.08, x + 0.08, paint, None, 0.1, z, z + dash)
                z += 2 * dash
        if self.rng.random() < 0.3:  # zebra crossing
            z = self.u(5, 20)
            for x in np.arange(self.left + 0.3, self.right - 0.5, 1.0):
                self.strip(x, x + 0.5, paint, None, 0.1, z, z + 3)
        kerb = paving * self.u(0.6, 1.2)
        for x in (self.left, self.right):
            self.strip(x - 0.1, x + 0.1, kerb, None, 0.1)

    def green(self) -> np.ndarray:
        color = np.array([self.u(35, 95), self.u(70, 130), self.u(20, 65)])
        if self.rng.random() < 0.2:  # autumn
            color = np.array([self.u(90, 150), self.u(70, 115), self.u(25, 60)])
        return color

    def wall(self) -> np.ndarray:
        base = self.u(60, 210) * np.ones(3)
        tint = np.array([self.u(0.9, 1.3), self.u(0.8, 1.1), self.u(0.6, 1.15)])
        return np.clip(base * (tint if self.rng.random() < 0.7 else 1.0), 20, 250)

    # ---- houses and hedges along the street

    def place_blocks(self, side: int) -> list:
        things, z = [], self.u(-6, 3)
        edge = (self.left if side < 0 else self.right) + side * self.walk
        while z < 110:
            length, kind = self.u(6, 20), self.rng.random()
            near, far = max(z, 1.5), z + length
            x = edge + side * self.u(0, 2.5)
            if far > 2.5 and kind < 0.68:
                things.append((far, self.paint_house, (side, x, near, far, self.u(5, 20))))
            elif far > 2.5 and kind < 0.92:
                things.append((far, self.paint_hedge, (side, x, near, far, self.u(0.8, 5))))
            z = far + (0 if self.rng.random() < 0.6 else self.u(0.5, 5))
        return things

    def paint_house(self, side: int, x: float, near: float, far: float, height: float) -> None:
        color = self.wall()
        bright = self.sun[(side + 1) // 2]
        outer = x + side * 14
        front = [(x, 0, near), (outer, 0, near), (outer, height, near), (x, height, near)]
        self.fill(front, color * (1.5 - bright) * 0.8, BUILDING, 0.12, near)
        self.fill(
            [(x, 0, near), (x, 0, far), (x, height, far), (x, height, near)], color * bright, BUILDING, 0.12, near
        )
        pane = self.sky * self.u(0.3, 1.0) if self.rng.random() < 0.4 else self.u(20, 110) * np.ones(3)
        storey, gap = self.u(2.6, 3.6), self.u(1.8, 3.2)
        if self.rng.random() < 0.4:  # shop floor
            top = storey * 0.9
            self.fill([(x, 0, near), (x, 0, far), (x, top, far), (x, top, near)], self.wall() * bright, None, 0.1, near)
        for y in np.arange(storey * self.u(0.2, 0.5), height - 1.6, storey):
            for z in np.arange(near + 0.6, min(far - 1.0, 60), gap):
                hole = [(x, y, z), (x, y, z + gap * 0.5), (x, y + 1.5, z + gap * 0.5), (x, y + 1.5, z)]
                self.fill(hole, pane * self.u(0.75, 1.1), None, 0.1, z)
            if near < 40:
                for w in np.arange(1.0, 12.0, gap):
                    a, b = x + side * w, x + side * (w + gap * 0.5)
                    self.fill(
                        [(a, y, near), (b, y, near), (b, y + 1.5, near), (a, y + 1.5, near)], pane, None, 0.1, near
                    )

    def paint_hedge(self, side: int, x: float, near: float, far: float, height: float) -> None:
        color = self.green()
        for z in np.linspace(far, near, 9):
            for _ in range(3):
                r = height * self.u(0.35, 0.6)
                place = x + side * self.u(r * 0.7, r * 0.7 + 3)
                self.disc(place, self.u(0.3, 0.6) * height, z, r, color * self.u(0.7, 1.15), VEGETATION, 0.45, 1.4)
        outer = x + side * 8
        low = height * 0.5
        self.fill([(x, 0, near), (x, 0, far), (x, low, far), (x, low, near)], color * 0.8, VEGETATION, 0.45, near)
        self.fill([(x, 0, near), (outer, 0, near), (outer, low, near), (x, low, near)], color, VEGETATION, 0.45, near)

    # ---- things on the sidewalk

    def place_furniture(self, side: int) -> list:
        things, z = [], self.u(6, 10)
        kerb = self.left if side < 0 else self.right
        while z < 45:
            x = kerb + side * self.u(0.3, 0.9)
            kind = self.rng.choice(5, p=[0.26, 0.20, 0.21, 0.21, 0.12])
            painter = (self.paint_tree, self.paint_lamp, self.paint_light, self.paint_sign, None)[kind]
            if painter is not None:
                things.append((z, painter, (x, z, side)))
            z += self.u(2.5, 9)
        for _ in range(self.rng.integers(1, 6)):
            z = self.u(5, 30)
            things.append((z, self.paint_person, (kerb + side * self.u(0.4, self.walk), z)))
        return things

    def metal(self) -> np.ndarray:
        return self.u(25, 190) * np.array([1.0, self.u(0.95, 1.05), self.u(0.9, 1.05)])

    def paint_tree(self, x: float, z: float, side: int) -> None:
        color, trunk = self.green(), self.u(2.0, 3.2)
        bark = self.u(40, 100) * np.array([1.1, 0.95, 0.75])
        self.upright(x, z, 0, trunk + 0.5, self.u(0.2, 0.45), bark, VEGETATION, 0.3)
        spread = self.u(0.8, 1.7)
        for _ in range(12):
            shift, rise = self.rng.normal(0, spread * 0.6), abs(self.rng.normal(0, spread * 0.8))
            radius = spread * self.u(0.35, 0.7)
            self.disc(x + shift, trunk + 0.3 + rise, z, radius, color * self.u(0.7, 1.2), VEGETATION, 0.45, 1.1)

    def paint_lamp(self, x: float, z: float, side: int) -> None:
        color, height = self.metal(), self.u(4.5, 8)
        self.upright(x, z, 0, height, self.u(0.12, 0.2), color, POLE)
        reach = -side * self.u(0.6, 2.0)
        self.fill(
            [(x, height, z), (x + reach, height + 0.2, z), (x + reach, height + 0.35, z), (x, height + 0.18, z)],
            color,
            POLE,
            0.1,
            z,
        )

    def paint_light(self, x: float, z: float, side: int) -> None:
        height = self.u(2.4, 3.6)
        self.upright(x, z, 0, height, self.u(0.11, 0.17), self.metal(), POLE)
        self.upright(x, z, height, height + 1.2, 0.5, self.u(15, 75) * np.ones(3), LIGHT)
        lit = int(self.rng.integers(3))
        for lamp, color in enumerate(((60, 230, 120), (250, 190, 50), (245, 50, 45))):
            bright = 1.0 if lamp == lit else 0.22
            self.disc(x, height + 0.22 + 0.37 * lamp, z, 0.16, np.array(color) * bright, None)

    def paint_sign(self, x: float, z: float, side: int) -> None:
        height, radius = self.u(2.0, 2.8), self.u(0.38, 0.55)
        self.upright(x, z, 0, height, self.u(0.08, 0.13), self.metal(), POLE)
        y, face = height + radius * 0.7, self.u(200, 250) * np.ones(3)
        rim = np.array([(200, 35, 40), (30, 70, 170), (225, 185, 40), (235, 235, 230)][self.rng.integers(4)])
        shape = self.rng.integers(3)
        for color, r, label in ((rim * self.u(0.7, 1.0), radius, SIGN), (face, radius * self.u(0.3, 0.7), None)):
            if shape == 0:
                self.disc(x, y, z, r, color, label)
            elif shape == 1:
                self.fill([(x - r, y - 0.7 * r, z), (x + r, y - 0.7 * r, z), (x, y + r, z)], color, label, 0.1, z)
            else:
                self.upright(x, z, y - r, y + r, 1.7 * r, color, label)

    def paint_person(self, x: float, z: float) -> None:
        tall = self.u(1.5, 1.9)
        coat, trousers = self.rng.uniform(15, 220, 3), self.rng.uniform(15, 130, 3)
        skin = self.u(85, 235) * np.array([1.0, self.u(0.7, 0.85), self.u(0.55, 0.75)])
        for step in (-1, 1):
            foot = x + step * self.u(0.05, 0.28)
            hip = (x + step * 0.1, 0.5 * tall, z)
            leg = [(foot - 0.08, 0, z), (foot + 0.1, 0, z), (hip[0] + 0.1, *hip[1:]), (hip[0] - 0.1, *hip[1:])]
            self.fill(leg, trousers, PERSON, 0.1, z)
        self.disc(x, 0.66 * tall, z, 0.2 * tall, coat, PERSON, 0.12, 0.75)
        self.disc(x, 0.92 * tall, z, 0.075 * tall, skin, PERSON, 0.05, 0.85)

    # ---- cars

    def place_parked_cars(self, side: int) -> list:
        if self.rng.random() < 0.3:
            return []
        things, z = [], self.u(4, 14)
        x = self.left + 1.0 if side < 0 else self.right - 1.0
        while z < 60:
            if self.rng.random() < 0.55:
                things.append((z, self.paint_car, (x + self.u(-0.15, 0.15), z, self.u(3.6, 4.8))))
            z += self.u(5.2, 8)
        return things

    def place_traffic(self) -> list:
        things = []
        for _ in range(self.rng.integers(0, 4)):
            x, z = self.u(self.left + 3, self.right - 3) if self.right - self.left > 6 else 0.0, self.u(7, 45)
            things.append((z, self.paint_car, (x, z, self.u(3.6, 4.8))))
        for _ in range(self.rng.integers(0, 3)):
            z = self.u(6, 25)
            things.append((z, self.paint_person, (self.u(self.left, self.right), z)))
        return things

    def paint_car(self, x: float, near: float, length: float) -> None:
        """A body box and a cabin on it, seen from behind (or from the front) with the flank that faces the camera."""
        far, half = near + length, self.u(0.82, 0.95)
        waist, roof = self.u(0.85, 1.0), self.u(1.35, 2.0)
        paint = self.u(25, 235) * np.ones(3) if self.rng.random() < 0.6 else self.rng.uniform(20, 210, 3)
        glass = self.u(20, 120) * np.ones(3)
        self.darken(
            [(x - half - 0.2, 0, near - 0.3), (x + half + 0.2, 0, near - 0.3), (x + half, 0, far), (x - half, 0, far)],
            0.5,
        )
        flank = x - half if x > 0 else x + half  # the flank turned to the camera
        inset = 0.12 if x > 0 else -0.12
        front, back = near + 0.3 * length * (roof < 1.7), far - 0.25 * length
        self.fill(
            [(flank, 0.2, near), (flank, 0.2, far), (flank, waist, far), (flank, waist, near)],
            paint * 0.75,
            CAR,
            0.06,
            near,
        )
        top = [(x - half, waist, near), (x + half, waist, near), (x + half, waist, far), (x - half, waist, far)]
        self.fill(top, paint * 1.05, CAR, 0.04, near)
        side = [(flank + inset, waist, front), (flank + inset, waist, back), (flank + inset, roof, back - 0.3)]
        self.fill([*side, (flank + inset, roof, front + 0.3)], glass * 0.8, CAR, 0.04, near)
        lid = [(x - half * 0.8, roof, front + 0.3), (x + half * 0.8, roof, front + 0.3)]
        self.fill([*lid, (x + half * 0.8, roof, back), (x - half * 0.8, roof, back)], paint, CAR, 0.04, near)
        pane = [(x - half * 0.95, waist, front), (x + half * 0.95, waist, front)]
        self.fill(
            [*pane, (x + half * 0.8, roof, front + 0.3), (x - half * 0.8, roof, front + 0.3)], glass, CAR, 0.04, near
        )
        for z in (near + 0.7, far - 0.8):
            wheel = [(flank, 0.32 + 0.32 * np.sin(a), z + 0.32 * np.cos(a)) for a in np.linspace(0, 2 * np.pi, 12)]
            self.fill(wheel, np.full(3, 22.0), CAR, 0.05, near)
        self.fill(
            [(x - half, 0.25, near), (x + half, 0.25, near), (x + half, waist, near), (x - half, waist, near)],
            paint * 0.9,
            CAR,
            0.06,
            near,
        )
        lamp = np.array([220, 40, 35]) if self.rng.random() < 0.6 else np.full(3, 235.0)
        for place in (x - half + 0.18, x + half - 0.18):
            self.upright(place, near, waist - 0.3, waist - 0.12, 0.3, lamp, None)
            self.upright(place, near, 0.0, 0.3, 0.22, np.full(3, 25.0), CAR)
        self.upright(x, near, 0.42, 0.56, 0.5, np.full(3, self.u(180, 240)), None)

    def paint_bonnet(self) -> None:
        angle = np.linspace(np.pi, 2 * np.pi, 24)
        rise = self.height * self.u(0.03, 0.10)
        column = self.width * (0.5 + 0.75 * np.cos(angle) * self.u(0.5, 0.8))
        pixels = np.stack([column, self.height + rise * np.sin(angle)], 1)
        self.fill_pixels(pixels, self.u(15, 120) * np.ones(3), IGNORE, 0.03)
