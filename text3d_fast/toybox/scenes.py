"""Toybox scenes: what a caption asks for, made into a signed distance function with colours.

A `Description` is the meaning of a caption; `sample_parameters` draws the continuous parameters of its objects and
`build_scene` makes the `Scene`: upright, front towards +Z, Y up, inside the ball of radius `SCENE_RADIUS`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from text3d_fast.toybox.objects import CLASSES, COLORS, PATTERNS, Palette, Part

SCENE_RADIUS = 0.8
SIZES = ("small", "tall")
STYLES = ("shaded", "textureless", "normal map")
VIEWS = ("front", "back", "left side", "right side", "overhead")
_SMALL, _TALL = 0.62, 1.4


@dataclass(frozen=True)
class Thing:
    """One object of a caption."""

    kind: str
    color: str
    pattern: str | None = None
    size: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, tuple(CLASSES)),
            ("color", self.color, tuple(COLORS)),
            ("pattern", self.pattern, (None, *PATTERNS)),
            ("size", self.size, (None, *SIZES)),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")


@dataclass(frozen=True)
class Description:
    """The meaning of a caption: an object, maybe a second one under it, maybe a view word, and a style."""

    thing: Thing
    base: Thing | None = None
    view: str | None = None
    style: str = "shaded"

    def __post_init__(self) -> None:
        if self.base is not None and not CLASSES[self.base.kind].base:
            known = tuple(name for name, kind in CLASSES.items() if kind.base)
            raise ValueError(f"base: expected one of {known}, got {self.base.kind!r}")
        if self.view not in (None, *VIEWS):
            raise ValueError(f"view: expected one of {VIEWS}, got {self.view!r}")
        if self.style not in STYLES:
            raise ValueError(f"style: expected one of {STYLES}, got {self.style!r}")

    @property
    def things(self) -> tuple[Thing, ...]:
        return (self.thing,) if self.base is None else (self.thing, self.base)

    def to_dict(self) -> dict:
        """As plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Description:
        """The inverse of `to_dict`."""
        base = data.get("base")
        return cls(Thing(**data["thing"]), Thing(**base) if base else None, data.get("view"), data["style"])


def held_out(kind: str, color: str) -> bool:
    """Whether this class x colour pair is kept out of every training set (26 of the 128 pairs, spread evenly)."""
    return (list(CLASSES).index(kind) * 3 + list(COLORS).index(color)) % 5 == 0


TRAINING_PAIRS = tuple((k, c) for k in CLASSES for c in COLORS if not held_out(k, c))
HELD_OUT_PAIRS = tuple((k, c) for k in CLASSES for c in COLORS if held_out(k, c))


@dataclass(frozen=True)
class _Group:
    """Parts in natural coordinates: natural = (world - offset) / (scale * (1, stretch, 1))."""

    parts: list[Part]
    scale: float
    stretch: float
    offset: tuple[float, float, float]

    def natural(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, y, z = points.unbind(-1)
        ox, oy, oz = self.offset
        return (x - ox) / self.scale, (y - oy) / (self.scale * self.stretch), (z - oz) / self.scale

    def distances(self, points: torch.Tensor) -> list[torch.Tensor]:
        coordinates = self.natural(points)
        # stretching by more than 1 makes the natural distance times the plain scale a safe lower bound
        return [part.solid.distance(*coordinates) * self.scale for part in self.parts]


def _hull(parts: list[Part], stretch: float) -> np.ndarray:
    return np.concatenate([part.solid.hull for part in parts]) * (1, stretch, 1)


@dataclass(frozen=True)
class Scene:
    """A scene as functions of world points, with the parameters it was made from."""

    description: Description
    parameters: dict[str, dict[str, float]]
    groups: list[_Group] = field(repr=False)
    radius: float = SCENE_RADIUS

    def sdf(self, points: torch.Tensor) -> torch.Tensor:
        """Signed distance [...] (negative inside) at world points [..., 3], in world units."""
        total = None
        for group in self.groups:
            for distance in group.distances(points):
                total = distance if total is None else torch.minimum(total, distance)
        return total

    def albedo(self, points: torch.Tensor) -> torch.Tensor:
        """Colour [..., 3] in 0..1 of the nearest part at world points [..., 3]."""
        flat = points.reshape(-1, 3)
        distances = torch.stack([d for group in self.groups for d in group.distances(flat)])
        owner = distances.argmin(0)
        colors = torch.empty_like(flat)
        index = 0
        for group in self.groups:
            for part in group.parts:
                rows = (owner == index).nonzero()[:, 0]
                if len(rows):
                    colors[rows] = part.albedo(*group.natural(flat[rows]))
                index += 1
        return colors.reshape(points.shape)

    def normals(self, points: torch.Tensor, step: float = 3e-3) -> torch.Tensor:
        """Unit outward normals [..., 3] by central differences on a tetrahedron of half edge `step`."""
        corners = points.new_tensor([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
        values = self.sdf(points + step * corners.view(4, *[1] * (points.dim() - 1), 3))
        return torch.nn.functional.normalize(torch.einsum("k...,kc->...c", values, corners), dim=-1)

    def mesh(self, resolution: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
        """The surface as triangles: vertices [V, 3] float32 and faces [F, 3] int32, counter-clockwise from outside.

        Marching tetrahedra on a Kuhn grid of `resolution` cells a side over [-1, 1]^3.
        """
        from text3d_fast.ops import TetGrid, marching_tets

        grid = TetGrid.kuhn(resolution)
        inside = torch.cat([-self.sdf(points) for points in grid.positions.split(1 << 17)])
        return marching_tets(grid.positions, inside, grid)


def sample_parameters(description: Description, generator: torch.Generator | None = None) -> dict:
    """Draws every continuous parameter: {"thing": {...}, "base": {...}, "scene": {"fill": ...}}."""

    def draw(ranges: dict[str, tuple[float, float]]) -> dict[str, float]:
        return {
            name: round(low + (high - low) * float(torch.rand((), generator=generator)), 4)
            for name, (low, high) in ranges.items()
        }

    parameters = {"scene": draw({"fill": (0.90, 1.0)}), "thing": draw(CLASSES[description.thing.kind].ranges)}
    if description.base is not None:
        parameters["base"] = draw(CLASSES[description.base.kind].ranges)
    return parameters


def middle_parameters(description: Description) -> dict:
    """The centre of every range: the typical member of the class."""
    parameters = {"scene": {"fill": 0.95}}
    for role, thing in zip(("thing", "base"), description.things, strict=False):
        parameters[role] = {name: (low + high) / 2 for name, (low, high) in CLASSES[thing.kind].ranges.items()}
    return parameters


def _object(thing: Thing, numbers: dict[str, float]) -> tuple[list[Part], float]:
    parts = CLASSES[thing.kind].build(numbers, Palette(thing.color, thing.pattern))
    return parts, _TALL if thing.size == "tall" else 1.0


def build_scene(description: Description, parameters: dict | None = None) -> Scene:
    """The scene of a description; `parameters` as from `sample_parameters` (default: the middle of every range)."""
    parameters = middle_parameters(description) if parameters is None else parameters
    parts, stretch = _object(description.thing, parameters["thing"])
    placed = [(parts, 1.0, stretch, np.zeros(3))]
    if description.base is not None:
        base_parts, base_stretch = _object(description.base, parameters["base"])
        base_hull, hull = _hull(base_parts, base_stretch), _hull(parts, stretch)
        wide = np.ptp(base_hull[:, [0, 2]], axis=0).min()
        # the upper object covers three quarters of the base, and neither dwarfs the other
        scale = 0.78 * wide / np.ptp(hull[:, [0, 2]], axis=0).max()
        scale = min(scale, 1.15 * np.ptp(base_hull, axis=0).max() / np.ptp(hull[:, 1]))
        if description.thing.size == "small":
            scale *= 0.75
        offset = np.zeros(3)
        offset[[0, 2]] = _middle(base_hull)[[0, 2]] - scale * _middle(hull)[[0, 2]]
        offset[1] = base_hull[:, 1].max() - scale * hull[:, 1].min() - 0.01
        placed = [(parts, scale, stretch, offset), (base_parts, 1.0, base_stretch, np.zeros(3))]
    points = np.concatenate([_hull(p, st) * sc + off for p, sc, st, off in placed])
    center = _middle(points)
    size = 0.98 * SCENE_RADIUS * parameters["scene"]["fill"] / np.linalg.norm(points - center, axis=1).max()
    if description.base is None and description.thing.size == "small":
        size *= _SMALL
    groups = [_Group(p, float(sc * size), st, tuple(((off - center) * size).tolist())) for p, sc, st, off in placed]
    return Scene(description, parameters, groups)


def _middle(points: np.ndarray) -> np.ndarray:
    return (points.min(0) + points.max(0)) / 2


def random_description(
    generator: torch.Generator | None = None, two_objects: float = 0.15, styles: tuple[float, float] = (0.08, 0.08),
    kinds: Collection[str] = tuple(CLASSES),
) -> Description:
    """A random training description: only training pairs; shares of two-object scenes, textureless and normal maps.

    kinds: the classes to draw from (what stands below another object may be of any). Raises ValueError for others.
    """
    if not kinds or not set(kinds) <= set(CLASSES):
        raise ValueError(f"kinds: expected some of {', '.join(CLASSES)}, got {', '.join(kinds) or 'none'}")

    def chance(share: float) -> bool:
        return float(torch.rand((), generator=generator)) < share

    def pick(options: tuple) -> object:
        return options[int(torch.randint(len(options), (), generator=generator))]

    def thing(pairs: tuple) -> Thing:
        kind, color = pick(pairs)
        pattern = pick(PATTERNS) if chance(0.2) else None
        size = pick(SIZES) if chance(0.2) else None
        return Thing(kind, color, pattern, size)

    upper, base = thing(tuple(pair for pair in TRAINING_PAIRS if pair[0] in kinds)), None
    if chance(two_objects):
        kind, color = pick(tuple(pair for pair in TRAINING_PAIRS if CLASSES[pair[0]].base))
        base = Thing(kind, color)
        upper = Thing(upper.kind, upper.color)
    style = float(torch.rand((), generator=generator))
    style = "textureless" if style < styles[0] else "normal map" if style < sum(styles) else "shaded"
    return Description(upper, base, None, style)
