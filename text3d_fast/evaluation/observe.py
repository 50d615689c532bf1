"""What cameras see of a mesh or of a true scene, in the same form, so that the two can be compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text3d_fast import ops
from text3d_fast.geometry import Mesh, read_mesh
from text3d_fast.scene.cameras import Cameras
from text3d_fast.toybox.render import FOV_Y, Surface, camera_frame, shade, trace
from text3d_fast.toybox.scenes import Scene


def as_mesh(source: Any) -> Mesh:
    """Positions, faces and vertex colours (unlit, or None), on the CPU in float32 and int32, of a `geometry.Mesh`,
    (vertices, faces), (vertices, faces, colors), or a file that `geometry.read_mesh` reads; a texture becomes colours.

    Raises ValueError if it is none of these, or wrong in its shapes.
    """
    if isinstance(source, (str, Path)):
        source = read_mesh(source)
    elif isinstance(source, tuple):
        colors = source[2] if len(source) > 2 else None
        source = Mesh(*source[:2], colors=None if colors is None else colors[:, :3])
    if not isinstance(source, Mesh):
        raise ValueError(f"mesh: expected a tuple, a file name or a geometry.Mesh, got {type(source).__name__}")
    colors = source.colors
    if colors is None and source.texture is not None and source.uv is not None:
        colors = _texture_colors(source)
    vertices, faces = source.vertices.detach().cpu().float(), source.faces.detach().cpu().to(torch.int32)
    return Mesh(vertices, faces, colors=None if colors is None else colors.detach().cpu().float())


def true_mesh(scene: Scene, resolution: int = 80) -> Mesh:
    """The mesh of a scene with its true colours."""
    vertices, faces = scene.mesh(resolution)
    return Mesh(vertices, faces, colors=scene.albedo(vertices))


def _texture_colors(mesh: Mesh) -> Tensor:
    """The texture at each vertex, at one of its places in the atlas."""
    place = mesh.uv.new_zeros(len(mesh.vertices), 2)
    place[mesh.faces.long().flatten()] = mesh.uv[mesh.uv_faces.long().flatten()]
    height, width = mesh.texture.shape[:2]
    column = (place[:, 0] * width).long().clamp(0, width - 1)
    row = ((1 - place[:, 1]) * height).long().clamp(0, height - 1)
    return mesh.texture[row, column]


def orbit_cameras(cameras: Tensor, size: int) -> Cameras:
    """`Cameras` of rows (elevation, azimuth, distance) with Toybox's field of view."""
    return Cameras.orbit(*cameras.unbind(1), FOV_Y, size)


def seen_surface(target: Mesh | Scene, cameras: Tensor, size: int = 96, supersample: int = 1) -> Surface:
    """The surface that cameras [B, 3] see: of a scene by sphere tracing, of a mesh by rasterization.

    Normals of a mesh are those of its faces, turned to the camera; a mesh without colours is grey.
    """
    if isinstance(target, Scene):
        parts = [trace(target, *rows.unbind(1), size, supersample) for rows in cameras.split(16)]
        return _joined(parts)
    side = size * supersample
    eye = camera_frame(cameras[:, 0], cameras[:, 1])[..., 2] * cameras[:, 2:]
    vertices, faces = target.vertices, target.faces
    if not len(faces):
        none = torch.zeros(0, dtype=torch.int64)
        return Surface(none, none, *(torch.zeros(0, 3) for _ in range(3)), eye, size, supersample)
    camera = orbit_cameras(cameras, side)
    clip = camera.projection() @ camera.world_to_camera()
    homogeneous = torch.cat([vertices, torch.ones_like(vertices[:, :1])], 1) @ clip.transpose(1, 2)
    rast, _ = ops.rasterize(homogeneous.contiguous(), faces, (side, side), grad_db=False)
    colors = torch.full_like(vertices, 0.5) if target.colors is None else target.colors
    values, _ = ops.interpolate(torch.cat([vertices, colors], 1), rast, faces)
    rast, values = rast.flip(1).reshape(-1, 4), values.flip(1).reshape(-1, 6)
    index = (rast[:, 3] > 0).nonzero()[:, 0]
    view = index // (side * side)
    positions, albedo = values[index].split(3, 1)
    corner = vertices[faces[rast[index, 3].long() - 1].long()]
    normals = torch.linalg.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    normals = torch.nn.functional.normalize(normals, dim=-1)
    away = (normals * (eye[view] - positions)).sum(-1, keepdim=True) < 0
    return Surface(index, view, positions, torch.where(away, -normals, normals), albedo, eye, size, supersample)


def _joined(parts: list[Surface]) -> Surface:
    first = parts[0]
    side, start = first.size * first.supersample, 0
    index, view = [], []
    for part in parts:
        index.append(part.index + start * side * side)
        view.append(part.view + start)
        start += len(part.eye)
    rest = (torch.cat([getattr(part, name) for part in parts]) for name in ("positions", "normals", "albedo", "eye"))
    return Surface(torch.cat(index), torch.cat(view), *rest, first.size, first.supersample)


def silhouettes(surface: Surface) -> Tensor:
    """Which sub-pixels are covered, bool [B, H, W]."""
    side = surface.size * surface.supersample
    mask = torch.zeros(len(surface.eye) * side * side, dtype=torch.bool)
    mask[surface.index] = True
    return mask.view(-1, side, side)


def pictures(target: Mesh | Scene, cameras: Tensor, size: int = 64) -> Tensor:
    """Images [B, size, size, 4] under the standard light, premultiplied, antialiased 2 x 2."""
    return torch.cat([shade(seen_surface(target, rows, size, 2)) for rows in cameras.split(16)])


def thinned(surface: Surface, cell: float, limit: int) -> Surface:
    """At most one point of the surface in each cube of side `cell`, and at most `limit`: nearly even in area."""
    if not len(surface.positions):
        return surface
    cells = torch.floor((surface.positions + 4) / cell).long()
    keys = (cells[:, 0] << 42) + (cells[:, 1] << 21) + cells[:, 2]
    order = torch.argsort(keys, stable=True)
    first = torch.ones(len(keys), dtype=torch.bool)
    first[1:] = keys[order][1:] != keys[order][:-1]
    rows = order[first]
    if len(rows) > limit:
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:limit]]
    parts = (getattr(surface, name)[rows] for name in ("index", "view", "positions", "normals", "albedo"))
    return Surface(*parts, surface.eye, surface.size, surface.supersample)


def projected_inside(mask: Tensor, cameras: Tensor, points: Tensor) -> Tensor:
    """Whether points [N, 3] fall on the silhouettes of each camera: bool [B, N]; mask [B, H, H]."""
    frame = camera_frame(cameras[:, 0], cameras[:, 1])
    local = points @ frame  # [B, N, 3] right, up, towards the camera
    depth = cameras[:, 2, None] - local[..., 2]
    size, half = mask.shape[-1], math.tan(FOV_Y / 2)
    column = ((local[..., 0] / (depth * half) + 1) * size / 2).floor().long()
    row = ((1 - local[..., 1] / (depth * half)) * size / 2).floor().long()
    known = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    flat = row.clamp(0, size - 1) * size + column.clamp(0, size - 1)
    return mask.flatten(1).gather(1, flat) & known
