"""Signed distance functions of simple solids, as closures over three coordinate tensors.

A `Solid` maps coordinates x, y, z (any equal shape) to a distance: negative inside, positive outside, never larger in
magnitude than the true distance by more than a few per cent, so that sphere tracing is safe. `hull` is a list of points
whose convex hull contains the solid (up to the tessellation of round parts): sizes and centres are computed from it.
The formulas are the classical ones of the field (J. C. Hart, "Sphere tracing", 1996, and the folklore after it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Distance = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Solid:
    """distance(x, y, z) -> signed distance, and hull [K, 3]: points that bound the solid."""

    distance: Distance
    hull: np.ndarray


def _directions(count: int = 64) -> np.ndarray:
    k = np.arange(count) + 0.5
    polar, turn = np.arccos(1 - 2 * k / count), math.pi * (1 + 5**0.5) * k
    spread = np.stack([np.cos(turn) * np.sin(polar), np.cos(polar), np.sin(turn) * np.sin(polar)], -1)
    axes = np.concatenate([np.eye(3), -np.eye(3)])
    return np.concatenate([spread, axes])


_SPHERE = _directions()
NO_HULL = np.zeros((0, 3))
_CIRCLE = np.stack([np.cos(np.arange(24) * math.pi / 12), np.sin(np.arange(24) * math.pi / 12)], -1)
# order of coordinates that turns a solid around the y axis into one around x, y or z
_AXES = {"x": (1, 0, 2), "y": (0, 1, 2), "z": (0, 2, 1)}


def _rotated(center: Sequence[float], axis: str, distance: Distance, hull: np.ndarray) -> Solid:
    """A solid around the y axis at the origin, moved to `center` with its axis along `axis`."""
    order = _AXES[axis]
    cx, cy, cz = (float(c) for c in center)

    def moved(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        local = (x - cx, y - cy, z - cz)
        return distance(local[order[0]], local[order[1]], local[order[2]])

    return Solid(moved, hull[:, list(order)] + np.asarray(center, dtype=float))


def sphere(center: Sequence[float], radius: float) -> Solid:
    """A ball."""
    cx, cy, cz = center

    def distance(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return ((x - cx).square() + (y - cy).square() + (z - cz).square()).sqrt() - radius

    return Solid(distance, _SPHERE * radius + np.asarray(center))


def ellipsoid(center: Sequence[float], radii: Sequence[float]) -> Solid:
    """An ellipsoid: f / |grad f| of its implicit form, first-order exact at the surface."""
    (cx, cy, cz), (rx, ry, rz) = center, radii
    low, high = min(radii), max(radii)

    def distance(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        u, v, w = (x - cx) / rx, (y - cy) / ry, (z - cz) / rz
        length = (u.square() + v.square() + w.square()).sqrt()
        slope = ((u / rx).square() + (v / ry).square() + (w / rz).square()).sqrt()
        # length / slope lies between the radii; towards the centre, where it is 0 / 0, the smallest radius takes over
        scale = (length / slope.clamp_min(1e-6)).clamp(low, high)
        return (length - 1) * torch.lerp(torch.full_like(scale, low), scale, length.square().clamp_max(1))

    return Solid(distance, _SPHERE * np.asarray(radii) + np.asarray(center))


def box(center: Sequence[float], half: Sequence[float], rounding: float = 0.0) -> Solid:
    """A box of half sizes `half` (rounding included) with rounded edges."""
    (cx, cy, cz), (hx, hy, hz) = center, (h - rounding for h in half)

    def distance(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        dx, dy, dz = (x - cx).abs_().sub_(hx), (y - cy).abs_().sub_(hy), (z - cz).abs_().sub_(hz)
        inside = torch.maximum(torch.maximum(dx, dy), dz).clamp_max_(0)
        dx, dy, dz = dx.clamp_min_(0), dy.clamp_min_(0), dz.clamp_min_(0)
        return (dx.square_().add_(dy.square_()).add_(dz.square_())).sqrt_().add_(inside).sub_(rounding)

    corners = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], dtype=float)
    shrink = rounding * (1 - 3**-0.5)
    return Solid(distance, corners * (np.asarray(half) - shrink) + np.asarray(center))


def cylinder(
    center: Sequence[float], radius: float, half_height: float, rounding: float = 0.0, axis: str = "y"
) -> Solid:
    """A solid cylinder of the given outer sizes with rounded rims."""
    inner_radius, inner_height = radius - rounding, half_height - rounding

    def distance(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        dr = (x.square() + z.square()).sqrt_().sub_(inner_radius)
        dy = y.abs().sub_(inner_height)
        inside = torch.maximum(dr, dy).clamp_max_(0)
        return (dr.clamp_min_(0).square_() + dy.clamp_min_(0).square_()).sqrt_().add_(inside).sub_(rounding)

    ring = np.concatenate([np.insert(_CIRCLE * radius, 1, side * half_height, axis=1) for side in (-1, 1)])
    return _rotated(center, axis, distance, ring)


def frustum(
    center: Sequence[float], bottom: float, top: float, half_height: float, rounding: float = 0.0, axis: str = "y"
) -> Solid:
    """Truncated cone: radius `bottom` at -half_height, `top` at +half_height of its axis, then rounded outwards."""
    k1, k2 = top - bottom, 2 * half_height
    slope = 1 / (k1 * k1 + k2 * k2)

    def distance(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        r = (x.square() + z.square()).sqrt_()
        cap_x = (r - torch.where(y < 0, bottom, top)).clamp_min(0)
        cap_y = y.abs() - half_height
        share = (((top - r) * k1 + (half_height - y) * k2) * slope).clamp_(0, 1)
        side_x = r - top + k1 * share
        side_y = y - half_height + k2 * share
        nearest = torch.minimum(cap_x.square() + cap_y.square(), side_x.square() + side_y.square()).sqrt()
        inside = (side_x < 0) & (cap_y < 0)
        return torch.where(inside, -nearest, nearest) - rounding

    grown = half_height + rounding
    ring = np.concatenate(
        [
            np.insert(_CIRCLE * (radius + rounding), 1, height, axis=1)
            for radius, height in ((bottom, -grown), (top, grown))
        ]
    )
    return _rotated(center, axis, distance, ring)


def torus(center: Sequence[float], ring: float, tube: float, axis: str = "y") -> Solid:
    """A torus around `axis`."""

    def distance(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        r = (x.square() + z.square()).sqrt_().sub_(ring)
        return (r.square() + y.square()).sqrt_() - tube

    outer = np.concatenate(
        [
            np.insert(_CIRCLE * (ring + tube * math.cos(a)), 1, tube * math.sin(a), axis=1)
            for a in (-math.pi / 2, -math.pi / 4, 0, math.pi / 4, math.pi / 2)
        ]
    )
    return _rotated(center, axis, distance, outer)


def capsule(start: Sequence[float], end: Sequence[float], start_radius: float, end_radius: float) -> Solid:
    """A rod with round ends whose radius goes linearly from one end to the other."""
    (ax, ay, az), (bx, by, bz) = start, end
    ux, uy, uz = bx - ax, by - ay, bz - az
    inverse = 1 / (ux * ux + uy * uy + uz * uz)
    grow = end_radius - start_radius

    def distance(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        px, py, pz = x - ax, y - ay, z - az
        share = ((px * ux + py * uy + pz * uz) * inverse).clamp_(0, 1)
        gap = ((px - share * ux).square_() + (py - share * uy).square_() + (pz - share * uz).square_()).sqrt_()
        return gap - (start_radius + grow * share)

    hull = np.concatenate([_SPHERE * start_radius + np.asarray(start), _SPHERE * end_radius + np.asarray(end)])
    return Solid(distance, hull)


def gable(center: Sequence[float], half_width: float, height: float, half_depth: float, rounding: float = 0.0) -> Solid:
    """A roof: a prism along z with a triangular section, `center` in the middle of its base."""
    cx, cy, cz = center
    norm = math.hypot(half_width, height)
    nx, ny = height / norm, half_width / norm

    def distance(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        up = y - cy
        slope = (x - cx).abs() * nx + (up - height) * ny
        return torch.maximum(torch.maximum(slope, -up), (z - cz).abs() - half_depth) - rounding

    points = [[s * half_width, 0, d * half_depth] for s in (-1, 1) for d in (-1, 1)]
    points += [[0, height, d * half_depth] for d in (-1, 1)]
    return Solid(distance, np.asarray(points) + np.asarray(center, dtype=float))


def union(*solids: Solid, smooth: float = 0.0) -> Solid:
    """The union; `smooth` > 0 blends the seams over that width (polynomial smooth minimum)."""

    def distance(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        total = solids[0].distance(x, y, z)
        for solid in solids[1:]:
            other = solid.distance(x, y, z)
            if smooth:
                overlap = (smooth - (total - other).abs()).clamp_min(0)
                total = torch.minimum(total, other) - overlap.square() / (4 * smooth)
            else:
                total = torch.minimum(total, other)
        return total

    return Solid(distance, np.concatenate([solid.hull for solid in solids]))


def subtract(solid: Solid, *cuts: Solid) -> Solid:
    """`solid` without `cuts`."""

    def distance(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        total = solid.distance(x, y, z)
        for cut in cuts:
            total = torch.maximum(total, -cut.distance(x, y, z))
        return total

    return Solid(distance, solid.hull)


def intersect(solid: Solid, other: Solid, hull: np.ndarray | None = None) -> Solid:
    """The part common to both; `hull` bounds it (default: the first solid's)."""

    def distance(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.maximum(solid.distance(x, y, z), other.distance(x, y, z))

    return Solid(distance, solid.hull if hull is None else hull)


def half_space_below(height: float) -> Solid:
    """Everything with y <= height (for cutting; it has no hull)."""
    return Solid(lambda x, y, z: y - height, NO_HULL)
