"""The classes of Toybox: each builds its parts (a solid and what it is painted with) from two or three numbers.

Natural coordinates: any size, Y up, the front towards +Z, the object's own left towards +X. `scenes.py` scales and
centres the result. `CLASSES[name].ranges` gives the continuous parameters with their low and high ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from text3d_fast.toybox import shapes as s
from text3d_fast.toybox.shapes import Solid

Paint = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.10),
    "orange": (0.97, 0.50, 0.06),
    "yellow": (0.97, 0.88, 0.12),
    "green": (0.12, 0.62, 0.20),
    "blue": (0.10, 0.27, 0.86),
    "purple": (0.55, 0.16, 0.72),
    "white": (0.94, 0.94, 0.94),
    "black": (0.12, 0.12, 0.13),
}
PATTERNS = ("striped", "checkered")
_BROWN, _DARK, _CREAM, _GLASS = (0.45, 0.27, 0.13), (0.10, 0.10, 0.11), (0.93, 0.87, 0.72), (0.60, 0.80, 0.92)
_DOUGH, _LIGHT = (0.85, 0.62, 0.36), (0.97, 0.97, 0.95)


@dataclass(frozen=True)
class Part:
    """One solid and its paint: a colour, or a function of x, y, z giving [N, 3]."""

    solid: Solid
    paint: Paint | tuple[float, float, float]

    def albedo(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Colours [N, 3] in 0..1 at natural coordinates."""
        if callable(self.paint):
            return self.paint(x, y, z)
        return x.new_tensor(self.paint).expand(len(x), 3)


@dataclass(frozen=True)
class Palette:
    """The main paint of an object (colour and pattern) and the colours that must differ from it."""

    color: str
    pattern: str | None = None

    @property
    def rgb(self) -> tuple[float, float, float]:
        return COLORS[self.color]

    @property
    def contrast(self) -> tuple[float, float, float]:
        """The second colour of patterns and marks: white, or dark on light colours."""
        return _DARK if self.color in ("white", "yellow") else _LIGHT

    def main(self, period: float = 0.36) -> Paint | tuple[float, float, float]:
        """The object's own colour, with its pattern (period in natural units)."""
        if self.pattern is None:
            return self.rgb
        if self.pattern == "striped":
            return mixed(self.rgb, self.contrast, lambda x, y, z: torch.remainder(y / period, 1) < 0.5)
        half = period / 2 * 1.15

        def odd(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            # the offset keeps faces of round sizes away from a cell boundary
            cells = torch.floor(x / half + 0.5) + torch.floor(y / half + 0.5) + torch.floor(z / half + 0.5)
            return torch.remainder(cells, 2) < 0.5

        return mixed(self.rgb, self.contrast, odd)


def mixed(color: Paint | tuple[float, float, float], mark: tuple[float, float, float], where: Callable) -> Paint:
    """`color` except where `where(x, y, z)` is true: there `mark`."""

    def paint(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        base = color(x, y, z) if callable(color) else x.new_tensor(color).expand(len(x), 3)
        return torch.where(where(x, y, z)[:, None], x.new_tensor(mark), base)

    return paint


def _toward(color: tuple[float, ...], other: tuple[float, ...], share: float) -> tuple[float, float, float]:
    r, g, b = (c + (o - c) * share for c, o in zip(color, other, strict=True))
    return r, g, b


@dataclass(frozen=True)
class Kind:
    """A class: its builder, parameter ranges, plural, whether things stand on it, whether its front differs."""

    build: Callable[[dict[str, float], Palette], list[Part]]
    ranges: dict[str, tuple[float, float]]
    plural: str
    base: bool = False
    front: bool = False


def _ball(p: dict[str, float], c: Palette) -> list[Part]:
    return [Part(s.ellipsoid((0, 0, 0), (1, p["height"], 1)), c.main(0.5))]


def _cube(p: dict[str, float], c: Palette) -> list[Part]:
    return [Part(s.box((0, 0, 0), (0.6, 0.6 * p["height"], 0.6), p["rounding"]), c.main(0.4))]


def _cone(p: dict[str, float], c: Palette) -> list[Part]:
    h = p["height"] / 2
    return [Part(s.frustum((0, 0, 0), p["radius"], 0.03, h, 0.02), c.main(0.42))]


def _donut(p: dict[str, float], c: Palette) -> list[Part]:
    tube = p["tube"]

    def iced(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return z < -tube * (0.30 + 0.12 * torch.sin(9 * torch.atan2(y, x)))

    return [Part(s.torus((0, 0, 0), 0.65, tube, "z"), mixed(c.main(0.36), _DOUGH, iced))]


def _cylinder(p: dict[str, float], c: Palette) -> list[Part]:
    return [Part(s.cylinder((0, 0, 0), p["radius"], p["height"] / 2, 0.03), c.main(0.4))]


def _mug(p: dict[str, float], c: Palette) -> list[Part]:
    radius, height, handle = p["radius"], p["height"], p["handle"]
    wall = 0.09
    inner = s.cylinder((0, wall + 0.2, 0), radius - wall, height / 2 + 0.2, 0.05)
    body = s.subtract(s.cylinder((0, 0, 0), radius, height / 2, 0.04), inner)
    grip = s.subtract(
        s.torus((radius - 0.02, 0, 0), handle, 0.085, "z"), s.cylinder((0, 0, 0), radius - wall / 2, height / 2)
    )
    return [Part(s.union(body, grip, smooth=0.05), c.main(0.36))]


def _chair(p: dict[str, float], c: Palette) -> list[Part]:
    w, legs, back = p["width"], p["legs"], p["back"]
    paint, leg = c.main(0.36), 0.075
    solids = [s.box((0, 0, 0), (w, 0.08, w), 0.03)]
    solids += [s.box((i * (w - leg), -legs / 2, k * (w - leg)), (leg, legs / 2, leg), 0.02) for i, k in _CORNERS]
    solids += [s.box((0, back / 2 + 0.05, -w + 0.07), (w, back / 2 + 0.05, 0.07), 0.03)]
    return [Part(s.union(*solids), paint)]


_CORNERS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


def _table(p: dict[str, float], c: Palette) -> list[Part]:
    w, d, h, leg = p["width"], 0.62, p["height"], 0.075
    solids = [s.box((0, h, 0), (w, 0.08, d), 0.03)]
    solids += [s.box((i * (w - 0.13), h / 2, k * (d - 0.13)), (leg, h / 2, leg), 0.02) for i, k in _CORNERS]
    return [Part(s.union(*solids), c.main(0.36))]


def _spotted(color: Paint | tuple[float, float, float], mark: tuple[float, float, float], height: float) -> Paint:
    """Seven round spots over a cap of the given height: one on top, six around."""
    spots = [(0.0, height, 0.0)]
    for k in range(6):
        a = math.pi * (k + 0.5) / 3
        spots.append((0.66 * math.sin(a), height * 0.60, 0.66 * math.cos(a)))

    def inside(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        hit = torch.zeros_like(x, dtype=torch.bool)
        for a, b, d in spots:
            hit |= (x - a).square() + (y - b).square() + (z - d).square() < 0.19**2
        return hit

    return mixed(color, mark, inside)


def _mushroom(p: dict[str, float], c: Palette) -> list[Part]:
    cap, stem, length = p["cap"], p["stem"], p["length"]
    top = s.ellipsoid((0, 0, 0), (0.9, cap, 0.9))
    dome = s.intersect(top, Solid(lambda x, y, z: -0.04 - y, s.NO_HULL), top.hull[top.hull[:, 1] > -0.06])
    main = c.main(0.36)
    paint = _spotted(main, c.contrast, cap) if c.pattern is None else main
    stalk = s.frustum((0, -length / 2, 0), stem * 1.15, stem * 0.9, length / 2, 0.03)
    return [Part(dome, paint), Part(stalk, _CREAM)]


def _tree(p: dict[str, float], c: Palette) -> list[Part]:
    w, trunk, step = p["width"], p["trunk"], 0.46
    parts = [Part(s.cylinder((0, -trunk / 2, 0), 0.16, trunk / 2 + 0.02), _BROWN)]
    tiers = [
        s.frustum((0, 0.33 + k * step, 0), w * (1 - 0.24 * k), 0.10 * (2 - k) + 0.02, 0.33, 0.02) for k in range(3)
    ]
    return [*parts, Part(s.union(*tiers), c.main(0.4))]


def _snowman(p: dict[str, float], c: Palette) -> list[Part]:
    low, mid, head = p["base"], p["middle"], 0.30
    y1 = low + mid * 0.62
    y2 = y1 + mid * 0.75 + head * 0.65
    body = s.union(s.sphere((0, 0, 0), low), s.sphere((0, y1, 0), mid), s.sphere((0, y2, 0), head), smooth=0.04)
    eyes = [s.sphere((side * 0.11, y2 + 0.08, head * 0.92), 0.05) for side in (-1, 1)]
    buttons = [s.sphere((0, y1 + dy, (mid**2 - dy**2) ** 0.5), 0.055) for dy in (-0.13, 0.10)]
    nose = s.capsule((0, y2 - 0.02, head * 0.9), (0, y2 - 0.05, head + 0.24), 0.07, 0.015)
    dark = _LIGHT if c.color == "black" else _DARK
    hat_paint = (0.75, 0.12, 0.12) if c.color == "black" else _DARK
    brim = s.cylinder((0, y2 + head * 0.78, 0), 0.30, 0.03, 0.02)
    hat = s.cylinder((0, y2 + head * 0.78 + 0.16, 0), 0.19, 0.16, 0.02)
    carrot = (0.97, 0.88, 0.12) if c.color == "orange" else (0.96, 0.48, 0.08)
    return [
        Part(body, c.main(0.36)),
        Part(s.union(*eyes, *buttons), dark),
        Part(nose, carrot),
        Part(s.union(brim, hat), hat_paint),
    ]


def _car(p: dict[str, float], c: Palette) -> list[Part]:
    length, cabin, wheel = p["length"], p["cabin"], p["wheel"]
    body = s.box((0, 0.05, 0), (0.42, 0.20, length), 0.09)
    top = s.box((0, 0.20 + cabin / 2, -0.14), (0.36, cabin / 2 + 0.08, length * 0.52), 0.10)

    def windows(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        band = (y > 0.27) & (y < 0.20 + cabin - 0.02)
        pillar = ((z + 0.14).abs() < 0.035) | ((z + 0.14).abs() > length * 0.52 - 0.07)
        return band & ~((x.abs() > 0.30) & pillar) & ~((x.abs() > 0.27) & (x.abs() < 0.31))

    wheels = [s.cylinder((i * 0.38, -0.14, k * length * 0.58), wheel, 0.09, 0.03, "x") for i, k in _CORNERS]
    lamps = [s.sphere((i * 0.27, 0.08, length - 0.015), 0.075) for i in (-1, 1)]
    tails = [s.box((i * 0.29, 0.10, -length + 0.01), (0.075, 0.05, 0.03), 0.01) for i in (-1, 1)]
    red = (0.45, 0.02, 0.02) if c.color == "red" else (0.80, 0.05, 0.05)
    lamp = _LIGHT if c.color == "yellow" else (1.0, 0.95, 0.60)
    glass = _GLASS if c.color in ("black", "blue", "purple") else (0.16, 0.22, 0.30)
    tyre = (0.30, 0.30, 0.31) if c.color == "black" else _DARK
    main = c.main(0.30)
    return [
        Part(body, main),
        Part(top, mixed(main, glass, windows)),
        Part(s.union(*wheels), tyre),
        Part(s.union(*lamps), lamp),
        Part(s.union(*tails), red),
    ]


def _house(p: dict[str, float], c: Palette) -> list[Part]:
    w, h, roof = p["width"], p["height"], p["roof"]
    d = 0.55
    walls = s.box((0, 0, 0), (w, h, d), 0.01)
    top = s.gable((0, h, 0), w + 0.12, roof, d + 0.08, 0.01)
    chimney = s.box((w * 0.55, h + roof * 0.68, -0.15), (0.09, 0.24, 0.09), 0.01)
    door = s.box((0, -h + 0.28, d), (0.14, 0.28, 0.025), 0.01)
    panes = [s.box((i * w * 0.62, 0.10, d), (0.12, 0.13, 0.02), 0.01) for i in (-1, 1)]
    panes += [s.box((i * w, 0.05, 0), (0.02, 0.13, 0.17), 0.01) for i in (-1, 1)]
    roof_paint = (0.62, 0.24, 0.16) if c.color in ("black", "blue", "purple", "green", "white") else (0.24, 0.20, 0.20)
    frame = _DARK if c.pattern or c.color in ("white", "yellow") else _LIGHT
    return [
        Part(walls, c.main(0.36)),
        Part(top, roof_paint),
        Part(chimney, (0.50, 0.48, 0.47)),
        Part(door, _BROWN if c.color != "black" else (0.66, 0.44, 0.24)),
        Part(s.union(*panes), frame),
    ]


def _teapot(p: dict[str, float], c: Palette) -> list[Part]:
    tall, spout, knob = p["height"], p["spout"], 0.11
    pot = s.ellipsoid((0, 0, 0), (0.70, tall, 0.70))
    pipe = s.union(
        s.capsule((0.52, -0.16, 0), (0.52 + spout * 0.6, 0.06, 0), 0.17, 0.11),
        s.capsule((0.52 + spout * 0.6, 0.06, 0), (0.56 + spout, 0.40, 0), 0.11, 0.085),
        smooth=0.08,
    )
    grip = s.torus((-0.74, 0.04, 0), 0.27, 0.07, "z")
    foot = s.cylinder((0, -tall + 0.03, 0), 0.36, 0.06, 0.02)
    lid = s.torus((0, tall * 0.86, 0), 0.30, 0.045)
    body = s.union(s.union(pot, pipe, smooth=0.10), s.union(grip, foot, lid), smooth=0.03)

    def emblem(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        r, a = (x.square() + (y - 0.02).square()).sqrt(), torch.atan2(y - 0.02, x)
        return (z > 0) & (r < 0.25 + 0.09 * torch.cos(5 * (a - math.pi / 2)))

    return [
        Part(body, mixed(c.main(0.36), c.contrast, emblem)),
        Part(s.sphere((0, tall + 0.05, 0), knob), c.contrast),
    ]


def _bowl(p: dict[str, float], c: Palette) -> list[Part]:
    depth, wall, foot = p["depth"], p["wall"], 0.40
    outer = s.ellipsoid((0, 0, 0), (0.95, depth, 0.95))
    inner = s.ellipsoid((0, 0.0, 0), (0.95 - wall, depth - wall, 0.95 - wall))
    shell = s.subtract(s.intersect(outer, s.half_space_below(0.0)), inner)
    shell = Solid(shell.distance, s.frustum((0, -depth / 2, 0), 0.6, 0.95, depth / 2).hull)
    inside = _toward(c.rgb, (1, 1, 1), 0.62) if c.color != "white" else (0.72, 0.72, 0.74)

    def lining(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        r = (x.square() + z.square()) / (0.95 - wall / 2) ** 2 + (y / (depth - wall / 2)).square()
        return (r < 1) & (y < -0.012)

    ring = s.cylinder((0, -depth, 0), foot, 0.07, 0.02)
    ring = s.subtract(ring, s.ellipsoid((0, 0.0, 0), (0.95 - wall, depth - wall, 0.95 - wall)))
    return [Part(s.union(shell, ring), mixed(c.main(0.30), inside, lining))]


def _clock(p: dict[str, float], c: Palette) -> list[Part]:
    thick, rim, hour = p["thickness"], p["rim"], p["hour"]
    disc = s.cylinder((0, 0, 0), 0.85, thick / 2, 0.05, "z")
    feet = [s.capsule((i * 0.50, -0.62, 0), (i * 0.62, -0.95, 0), 0.10, 0.08) for i in (-1, 1)]
    dial = 0.85 - rim
    hands = ((math.radians(30 * hour), 0.34, 0.055), (0.0, 0.52, 0.04))

    def face(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (z > thick / 2 - 0.03) & (x.square() + y.square() < dial**2)

    def marks(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        r, a = (x.square() + y.square()).sqrt(), torch.atan2(x, y)
        step = math.pi / 6
        off = torch.remainder(a + step / 2, step) - step / 2
        hit = (r < 0.07) | ((r > dial - 0.14) & (r < dial - 0.04) & ((off * r).abs() < 0.035))
        for turn, length, half in hands:
            along, across = x * math.sin(turn) + y * math.cos(turn), x * math.cos(turn) - y * math.sin(turn)
            hit |= (along > 0) & (along < length) & (across.abs() < half)
        return hit & (z > thick / 2 - 0.03)

    ink = (0.45, 0.05, 0.05) if c.color == "black" else _DARK
    return [Part(s.union(disc, *feet, smooth=0.03), mixed(mixed(c.main(0.36), _LIGHT, face), ink, marks))]


CLASSES: dict[str, Kind] = {
    "ball": Kind(_ball, {"height": (0.94, 1.0)}, "balls"),
    "cube": Kind(_cube, {"height": (0.92, 1.08), "rounding": (0.02, 0.12)}, "cubes", base=True),
    "cone": Kind(_cone, {"radius": (0.50, 0.68), "height": (1.2, 1.5)}, "cones"),
    "donut": Kind(_donut, {"tube": (0.24, 0.34)}, "donuts", front=True),
    "cylinder": Kind(_cylinder, {"radius": (0.42, 0.56), "height": (1.0, 1.4)}, "cylinders", base=True),
    "mug": Kind(_mug, {"radius": (0.46, 0.56), "height": (1.0, 1.25), "handle": (0.28, 0.36)}, "mugs", front=True),
    "chair": Kind(_chair, {"width": (0.46, 0.56), "legs": (0.62, 0.80), "back": (0.62, 0.82)}, "chairs", front=True),
    "table": Kind(_table, {"width": (0.75, 0.95), "height": (0.70, 0.95)}, "tables", base=True),
    "mushroom": Kind(_mushroom, {"cap": (0.60, 0.80), "stem": (0.24, 0.34), "length": (0.65, 0.90)}, "mushrooms"),
    "tree": Kind(_tree, {"width": (0.62, 0.80), "trunk": (0.45, 0.65)}, "trees"),
    "snowman": Kind(_snowman, {"base": (0.52, 0.62), "middle": (0.38, 0.46)}, "snowmen", front=True),
    "car": Kind(_car, {"length": (0.85, 1.0), "cabin": (0.32, 0.42), "wheel": (0.19, 0.24)}, "cars", front=True),
    "house": Kind(_house, {"width": (0.55, 0.70), "height": (0.42, 0.52), "roof": (0.42, 0.60)}, "houses", front=True),
    "teapot": Kind(_teapot, {"height": (0.54, 0.66), "spout": (0.38, 0.50)}, "teapots", front=True),
    "bowl": Kind(_bowl, {"depth": (0.58, 0.75), "wall": (0.10, 0.15)}, "bowls"),
    "clock": Kind(_clock, {"thickness": (0.24, 0.36), "rim": (0.12, 0.18), "hour": (2.0, 5.0)}, "clocks", front=True),
}
