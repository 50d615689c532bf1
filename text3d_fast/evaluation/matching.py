"""Does a mesh look like what was asked for? Retrieval over all class x colour pairs, and the Janus measure.

Both compare pictures under the standard light from cameras that no training uses with pictures of true scenes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from text3d_fast.evaluation.metrics import held_out_cameras
from text3d_fast.evaluation.observe import pictures, seen_surface
from text3d_fast.geometry import Mesh
from text3d_fast.toybox.objects import CLASSES, COLORS
from text3d_fast.toybox.render import over, shade
from text3d_fast.toybox.scenes import Description, Scene, Thing, build_scene

_GROUND = torch.tensor([0.55, 0.60, 0.65])  # far from all eight colours
_SIZE = 32


def _looks(target: Mesh | Scene, cameras: Tensor) -> Tensor:
    """Pictures [B, P] over one background, reduced to 32 x 32 so that a pixel's shift counts little."""
    return _reduced(pictures(target, cameras, 2 * _SIZE))


def _reduced(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(over(images, _GROUND).permute(0, 3, 1, 2), 2).flatten(1)


class Gallery:
    """Pictures of the typical member of every class x colour pair from 6 unseen cameras."""

    def __init__(self) -> None:
        self.cameras = held_out_cameras(6)
        self.pairs = [(kind, color) for kind in CLASSES for color in COLORS]
        with torch.no_grad():
            self.looks = torch.cat([self._colors_of(kind) for kind in CLASSES])

    def _colors_of(self, kind: str) -> Tensor:
        """The class in every colour: traced once, painted eight times."""
        scenes = [build_scene(Description(Thing(kind, color))) for color in COLORS]
        surface = seen_surface(scenes[0], self.cameras, 2 * _SIZE, 2)
        painted = (replace(surface, albedo=scene.albedo(surface.positions)) for scene in scenes)
        return torch.stack([_reduced(shade(colored)) for colored in painted])

    @torch.no_grad()
    def retrieve(self, target: Mesh | Scene) -> Retrieval:
        """The pairs by how much they look like the target, nearest first."""
        looks = _looks(target, self.cameras)
        distance = (self.looks - looks).square().mean((1, 2))
        return Retrieval([self.pairs[k] for k in distance.argsort().tolist()])


@dataclass(frozen=True)
class Retrieval:
    """Class x colour pairs, nearest first."""

    pairs: list[tuple[str, str]]

    def rank(self, description: Description) -> int:
        """1 if the pair asked for is the nearest."""
        return self.pairs.index((description.thing.kind, description.thing.color)) + 1


@dataclass(frozen=True)
class Facing:
    """Which true azimuth each of 36 views of a mesh looks like (degrees).

    directional    whether the class has a front; without one the rest says nothing
    agreement      share of views within 30 degrees of the truth
    janus          a view from behind (beyond 90 degrees) looks like the front (within 45): a second front
    """

    matched: list[int]
    directional: bool
    agreement: float
    janus: bool


@torch.no_grad()
def facing(target: Mesh | Scene, truth: Scene, count: int = 36, elevation: float = 15.0) -> Facing:
    """Matches views of a mesh, 360 / count degrees apart, with views of the truth."""
    azimuth = torch.arange(count) * (2 * math.pi / count)
    cameras = torch.stack(
        [torch.full_like(azimuth, math.radians(elevation)), azimuth, torch.full_like(azimuth, 2.7)], 1
    )
    true, ours = _looks(truth, cameras), _looks(target, cameras)
    step = 360 // count
    degrees = torch.arange(count) * step
    off = (degrees[:, None] - degrees + 180) % 360 - 180
    distance = torch.cdist(ours, true, compute_mode="donot_use_mm_for_euclid_dist").square() / true.shape[1]
    best = distance.argmin(1)
    error = off[torch.arange(count), best].abs()
    # a second front: from behind, a front picture fits clearly better than any from behind
    behind = off[0].abs() > 90
    front = off[0].abs() <= 45
    doubled = behind & (distance[:, front].amin(1) < 0.8 * distance[:, behind].amin(1))
    directional = CLASSES[truth.description.thing.kind].front
    return Facing(degrees[best].tolist(), directional, float((error <= 30).float().mean()), bool(doubled.any()))


def wilson_interval(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a rate (Wilson 1927); (0, 1) without trials."""
    if not total:
        return 0.0, 1.0
    share, slack = hits / total, z * z / total
    middle = (share + slack / 2) / (1 + slack)
    half = z * math.sqrt(share * (1 - share) / total + slack / (4 * total)) / (1 + slack)
    return max(0.0, middle - half), min(1.0, middle + half)
