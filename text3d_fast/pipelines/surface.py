"""From an optimized volume to the mesh of its surface."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from text3d_fast import geometry
from text3d_fast.pipelines.pictures import mesh_silhouettes, volume_views
from text3d_fast.pipelines.stage import Extraction
from text3d_fast.scene.cameras import CameraDistribution
from text3d_fast.scene.field import RadianceField
from text3d_fast.scene.volume_renderer import VolumeRenderer

# Shares above which a warning is given.
FOG = 0.15
FLOATERS = 0.01


@torch.no_grad()
def volume_surface(
    renderer: VolumeRenderer, field: RadianceField, cameras: CameraDistribution, resolution: int, texture: int,
    faces: int = 0,
) -> Extraction:
    """The cleaned, coloured mesh of a volume, figures about it, and warnings.

    resolution of the extraction grid; texture and faces as `asset` has them. The level is the one whose
    silhouettes are the volume's.
    """
    device = renderer.occupancy.aabb.device
    fog = measure_fog(renderer, field, cameras)
    warnings = []
    if fog > FOG:
        warnings.append(f"fog: {fog:.0%} of what is visible is half transparent; more steps may harden it")
    density = geometry.averaged_density(renderer.visible_density(field), renderer.step, resolution=resolution,
                                        device=device)
    level, agreement = choose_threshold(renderer, field, cameras, density)
    if level is None:
        nothing = torch.zeros(0, 3, device=device)
        return Extraction(geometry.Mesh(nothing, nothing.int()), {"vertices": 0, "faces": 0, "fog": round(fog, 4)},
                          warnings)
    mesh, threshold = geometry.extract_mesh(density, resolution, level, device=device)
    mesh, report = geometry.clean_mesh(mesh)
    floaters = [piece for piece in report.dropped if piece.reason != "cavity"]
    area = sum(piece.area for piece in floaters)
    if floaters and area > FLOATERS * report.kept_area:
        warnings.insert(0, f"floaters: {len(floaters)} loose pieces with {area / (area + report.kept_area):.0%} of the "
                           f"surface were removed")
    if len(mesh.faces):
        mesh = asset(mesh, lambda points: field(points).albedo, faces, texture)
    figures = {
        "vertices": len(mesh.vertices), "faces": len(mesh.faces), "threshold": round(threshold, 3),
        "silhouette_agreement": round(agreement, 4),
        "components": report.kept, "floaters_removed": len(floaters),
        "cavities_removed": len(report.dropped) - len(floaters),
    }
    if len(mesh.faces):
        low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
        figures["size"] = [round(value, 3) for value in (high - low).tolist()]
    return Extraction(mesh, figures | {"fog": round(fog, 4)}, warnings)


def asset(mesh: geometry.Mesh, albedo: Callable[[Tensor], Tensor], faces: int, texture: int) -> geometry.Mesh:
    """The mesh as it is exported, with the colours of a field, points [N, 3] -> [N, 3].

    faces: at most so many, 0 for all. texture: texels of the side of a texture; fewer faces get a normal map of that
    side too, with the normals of the mesh as it was. 0: vertex colours.
    """
    whole = mesh
    if faces:
        mesh = geometry.decimate(mesh, faces)
    mesh.colors = geometry.sample_colors(albedo, mesh.vertices)
    if texture:
        mesh = geometry.bake_texture(geometry.unwrap(mesh, texture), albedo, texture)
        if len(mesh.faces) < len(whole.faces):
            mesh = geometry.bake_normals(mesh, geometry.nearest_normals(whole), texture)
    return mesh


@torch.no_grad()
def choose_threshold(
    renderer: VolumeRenderer, field: RadianceField, cameras: CameraDistribution,
    density: Callable[[Tensor], Tensor], resolution: int = 64,
) -> tuple[float | str | None, float]:
    """The level to cut `density` at: the one whose mesh has the silhouettes of the volume (opacity above one half).

    A surface that is opaque only over several samples, as thin or soft ones are, would vanish or fray at a fixed
    density. Also returns the mean intersection over union of the silhouettes, from 8 sides. None: nothing is opaque.
    """
    azimuths, elevations = [45.0 * k for k in range(8)], (10.0, 50.0)
    device = renderer.occupancy.aabb.device
    seen = torch.cat([volume_views(renderer, field, cameras, azimuths[k::2], elevations[k], 96, "albedo")[1] > 0.5
                      for k in (0, 1)])
    best: tuple[float | str, float] = ("auto", 0.0)
    if not bool(seen.any()):
        return None, 0.0
    level: float | str = "auto"
    for _ in range(8):
        mesh, used = geometry.extract_mesh(density, resolution, level, device=device)
        mesh, _ = geometry.clean_mesh(mesh)
        masks = torch.cat([mesh_silhouettes(mesh, cameras, azimuths[k::2], elevations[k], 96) for k in (0, 1)])
        either = (masks | seen).sum()
        agreement = float((masks & seen).sum() / either) if either else 0.0
        if agreement > best[1] + 1e-3:
            best = used, agreement
        level = used * 0.6
        if level <= 0:
            break
    return best


@torch.no_grad()
def measure_fog(renderer: VolumeRenderer, field: RadianceField, cameras: CameraDistribution) -> float:
    """The share of the visible opacity that lies in half-transparent pixels (0.1 to 0.9), edges not counted."""
    _, opacity = volume_views(renderer, field, cameras, [0.0, 90.0, 180.0, 270.0], size=64, mode="albedo")
    covered = (opacity > 0.05).float()[:, None]
    inner = 1 - torch.nn.functional.max_pool2d(1 - covered, 5, stride=1, padding=2)
    inner = inner[:, 0] > 0
    half = inner & (opacity > 0.1) & (opacity < 0.9)
    return float(half.sum()) / max(float(inner.sum()), 1.0)
