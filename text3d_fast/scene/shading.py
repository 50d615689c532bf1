"""Diffuse reflectance, and which kind of shading a step of the optimization uses.

Works on points of a volume and on the pixels of a rasterized mesh alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from text3d_fast.scene.lights import Lights

MODES = ("albedo", "lambertian", "textureless")


def shade(
    albedo: Tensor, normals: Tensor | None, positions: Tensor, lights: Lights, light_ids: Tensor, mode: str
) -> Tensor:
    """c = albedo * (l_rho * max(0, n . (l - mu) / |l - mu|) + l_a), [N, 3].

    albedo, positions [N, 3]; normals [N, 3] unit or zero, None allowed with "albedo"; light_ids int [N], the row of
    `lights` for each point. "textureless" replaces the albedo with white; "albedo" returns it unlit.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "albedo":
        return albedo
    if normals is None:
        raise ValueError(f"normals: expected [N, 3] with mode {mode!r}, got None")
    count = len(lights)
    if count == 1:  # broadcast instead of a gather over all points
        position, diffuse, ambient = lights.position, lights.diffuse, lights.ambient
    else:
        rows = light_ids.long()
        position, diffuse, ambient = lights.position[rows], lights.diffuse[rows], lights.ambient[rows]
    towards = torch.nn.functional.normalize(position - positions, dim=-1)
    light = diffuse * (normals * towards).sum(-1, keepdim=True).clamp_min(0) + ambient
    return light if mode == "textureless" else albedo * light


@dataclass
class ShadingSchedule:
    """Which mode a step uses (DreamFusion: albedo for the first 1000 of 15000 steps, then lit with probability 0.75,
    and half of the lit ones without texture).

    albedo_until  progress in [0, 1] before which only albedo is shown
    lit           probability of lighting after that
    textureless   probability that a lit step has no texture
    """

    albedo_until: float = 1 / 15
    lit: float = 0.75
    textureless: float = 0.5

    def sample(self, progress: float, generator: torch.Generator) -> str:
        """One of MODES. Always consumes two random numbers, so that runs with other settings stay comparable."""
        lit, bare = torch.rand(2, generator=generator).tolist()
        if progress < self.albedo_until or lit >= self.lit:
            return "albedo"
        return "textureless" if bare < self.textureless else "lambertian"
