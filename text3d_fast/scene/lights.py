"""Point lights with a diffuse and an ambient colour, one for each camera."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from text3d_fast.scene.cameras import Cameras

# DreamFusion's cameras stand 1 to 1.5 from the origin; its light distances are in the same units.
_PAPER_DISTANCE = 1.25


@dataclass
class Lights:
    """B point lights.

    position  [B, 3] in the world
    diffuse   [B, 3] rgb of the light itself (l_rho)
    ambient   [B, 3] rgb of the light from everywhere (l_a)
    """

    position: Tensor
    diffuse: Tensor
    ambient: Tensor

    def __post_init__(self) -> None:
        for name in ("diffuse", "ambient", "position"):
            value = getattr(self, name)
            if value.shape != self.position.shape or value.ndim != 2 or value.shape[1] != 3:
                raise ValueError(f"{name}: expected shape [B, 3], got {list(value.shape)}")

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, rows: slice | Tensor) -> Lights:
        """Some of the lights: a slice, or a tensor of indices or booleans."""
        return Lights(self.position[rows], self.diffuse[rows], self.ambient[rows])

    def to(self, device: torch.device | str) -> Lights:
        return Lights(self.position.to(device), self.diffuse.to(device), self.ambient.to(device))


@dataclass
class LightDistribution:
    """Random lights on the camera's side (Poole et al., appendix A.2), in units where the camera stands at 1.25.

    The direction is that of a draw from N(camera position + lift * up, spread^2 I), the distance U(distance).
    diffuse, ambient  (low, high) of the grey level
    angle   degrees; instead, the direction is uniform in angle within so many of the camera's (Magic3D: 60)
    soft    the ambient light is what the diffuse one lacks to 1 (threestudio's soft shading, with diffuse from 0 to 1)
    """

    spread: float = 1.0
    lift: float = 0.0
    distance: tuple[float, float] = (0.8, 1.5)
    diffuse: tuple[float, float] = (0.9, 0.9)
    ambient: tuple[float, float] = (0.1, 0.1)
    angle: float | None = None
    soft: bool = False

    def sample(self, cameras: Cameras, generator: torch.Generator | None = None) -> Lights:
        """One light for each camera."""
        count, device = len(cameras), cameras.device
        source = device if generator is None else generator.device

        def uniform(bounds: tuple[float, float]) -> Tensor:
            low, high = bounds
            return (low + (high - low) * torch.rand(count, 1, generator=generator, device=source)).to(device)

        unit = cameras.position.norm(dim=-1, keepdim=True) / _PAPER_DISTANCE
        offset = torch.randn(count, 3, generator=generator, device=source).to(device) * self.spread
        if self.angle is None:
            offset[:, 1] += self.lift
            direction = torch.nn.functional.normalize(cameras.position / unit + offset, dim=-1)
        else:  # the random offset says into which direction the light leaves the axis
            axis = torch.nn.functional.normalize(cameras.position, dim=-1)
            across = torch.nn.functional.normalize(torch.linalg.cross(axis, offset), dim=-1)
            away = torch.deg2rad(uniform((0.0, self.angle)))
            direction = away.cos() * axis + away.sin() * across
        position = direction * uniform(self.distance) * unit
        diffuse, ambient = uniform(self.diffuse), uniform(self.ambient)
        if self.soft:
            ambient = (1 - diffuse).clamp(min=0)
        return Lights(position, diffuse.expand(count, 3), ambient.expand(count, 3))


def headlights(cameras: Cameras, diffuse: float = 0.65, ambient: float = 0.4) -> Lights:
    """A fixed light up and to the right of each camera, for pictures."""
    matrix = cameras.camera_to_world
    position = cameras.position + 0.9 * matrix[:, :3, 0] + 1.2 * matrix[:, :3, 1]
    return Lights(position, torch.full_like(position, diffuse), torch.full_like(position, ambient))
