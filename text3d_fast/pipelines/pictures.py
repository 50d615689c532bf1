"""Pictures: previews of the volume in training, views of the finished mesh."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from text3d_fast import ops
from text3d_fast.geometry import Mesh
from text3d_fast.scene.cameras import CameraDistribution, Cameras
from text3d_fast.scene.field import RadianceField
from text3d_fast.scene.lights import headlights
from text3d_fast.scene.mesh_renderer import clip_positions, render_meshes
from text3d_fast.scene.volume_renderer import VolumeRenderer

WHITE = (1.0, 1.0, 1.0)
VIEW_LABELS = ["front", "45", "left", "135", "back", "225", "right", "315"]
TURNTABLE_FRAMES = 36


@torch.no_grad()
def volume_views(
    renderer: VolumeRenderer, field: RadianceField, cameras: CameraDistribution, azimuths: list[float],
    elevation: float = 15.0, size: int = 128, mode: str = "lambertian", normals: str = "analytic",
    ground: tuple[float, float, float] = WHITE,
) -> tuple[Tensor, Tensor]:
    """Pictures [V, size, size, 3] in 0..1 and opacities [V, size, size] of the volume; angles in degrees."""
    device = renderer.occupancy.aabb.device
    pictures, opacities = [], []
    around, background = orbits(cameras, azimuths, elevation, size, device), torch.tensor([ground], device=device)
    for view in (around[k] for k in range(len(around))):
        rendering = renderer(field, view, background, headlights(view), mode, None if mode == "albedo" else normals)
        pictures.append(rendering.color.clamp(0, 1))
        opacities.append(rendering.opacity)
    return torch.cat(pictures), torch.cat(opacities)


@torch.no_grad()
def mesh_views(
    mesh: Mesh, cameras: CameraDistribution, azimuths: list[float], elevation: float = 15.0, size: int = 256,
    ground: tuple[float, float, float] = WHITE,
) -> Tensor:
    """Pictures [V, size, size, 3] in 0..1 of the exported mesh; angles in degrees. An empty mesh gives empty ones."""
    background = torch.tensor([ground], device=mesh.vertices.device)
    if not len(mesh.faces):
        return background.expand(len(azimuths), size, size, 3)
    mesh, around = mesh.with_normals(), orbits(cameras, azimuths, elevation, size, mesh.vertices.device)
    several = max(1, 8 * 256**2 // size**2)  # at once: mipmaps and tangents are made once for them
    parts = [around[first : first + several] for first in range(0, len(around), several)]
    return torch.cat([render_meshes([mesh], part, background, headlights(part)).color.clamp(0, 1) for part in parts])


@torch.no_grad()
def mesh_silhouettes(
    mesh: Mesh, cameras: CameraDistribution, azimuths: list[float], elevation: float, size: int
) -> Tensor:
    """Which pixels the mesh covers, bool [V, size, size]."""
    masks = [torch.zeros(size, size, dtype=torch.bool, device=mesh.vertices.device)] * len(azimuths)
    if len(mesh.faces):
        around = orbits(cameras, azimuths, elevation, size, mesh.vertices.device)
        for k in range(len(around)):
            rast, _ = ops.rasterize(clip_positions(mesh.vertices, around[k]).contiguous(), mesh.faces, (size, size))
            masks[k] = rast[0, ..., 3].flip(0) != 0
    return torch.stack(masks)


def orbits(
    cameras: CameraDistribution, azimuths: list[float], elevation: float, size: int, device: torch.device
) -> Cameras:
    """One camera for each azimuth (degrees), at the middle of the distances and fields of view of the run."""
    fov_y, distance = math.radians(sum(cameras.fov_y) / 2), sum(cameras.distance) / 2
    around = torch.tensor([math.radians(azimuth) for azimuth in azimuths])
    return Cameras.orbit(math.radians(elevation), around, distance, fov_y, size, device)


def views(mesh: Mesh, cameras: CameraDistribution, size: int = 256) -> Tensor:
    """[8, size, size, 3] every 45 degrees from the front, as VIEW_LABELS."""
    return mesh_views(mesh, cameras, [45.0 * k for k in range(8)], size=size)


def turntable(mesh: Mesh, cameras: CameraDistribution, frames: int = TURNTABLE_FRAMES, size: int = 256) -> Tensor:
    """[frames, size, size, 3] once around."""
    return mesh_views(mesh, cameras, [360.0 * k / frames for k in range(frames)], size=size)
