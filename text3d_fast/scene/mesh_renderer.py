"""Pictures of triangle meshes: rasterize, interpolate, texture, shade, antialias. Differentiable in the vertices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from text3d_fast import ops
from text3d_fast.reference.rasterize import decode_triangle_ids, encode_triangle_ids
from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.lights import Lights
from text3d_fast.scene.shading import shade

PLAIN = 0.75  # grey of a mesh that has no colours


class TexturedMesh(Protocol):
    """What is rendered, for example `geometry.Mesh`: vertices [V, 3], faces int [F, 3]; the rest may be None."""

    vertices: Tensor
    faces: Tensor
    normals: Tensor | None
    colors: Tensor | None
    uv: Tensor | None
    uv_faces: Tensor | None
    texture: Tensor | None


@dataclass
class MeshRendering:
    """Images of one batch, row 0 at the top.

    color    [B, H, W, 3] shaded, over the background, silhouettes antialiased
    mask     [B, H, W] coverage in 0..1, antialiased
    normals  [B, H, W, 3] unit, in the world, 0 where nothing is seen
    depth    [B, H, W] distance along the viewing axis in world units, 0 where nothing is seen
    """

    color: Tensor
    mask: Tensor
    normals: Tensor
    depth: Tensor


def clip_positions(vertices: Tensor, cameras: Cameras, near: float = 0.05, far: float = 100.0) -> Tensor:
    """World positions [V, 3] -> clip space [B, V, 4]."""
    matrix = cameras.projection(near, far) @ cameras.world_to_camera()
    homogeneous = torch.cat([vertices, torch.ones_like(vertices[:, :1])], -1)
    return homogeneous @ matrix.transpose(1, 2)


def render_meshes(
    meshes: Sequence[TexturedMesh],
    cameras: Cameras,
    background: Tensor,
    lights: Lights | None = None,
    mode: str = "lambertian",
    material: Callable[[Tensor], Tensor] | None = None,
    topology: Tensor | None = None,
    two_sided: bool = False,
) -> MeshRendering:
    """Render meshes into one picture, with common depth and light.

    background: [B, 3] or [B, H, W, 3]. lights: one for all cameras or one each; not needed with mode "albedo" (the
    modes are those of `shading.shade`). material: albedo [N, 3] at world positions [N, 3], instead of the meshes'
    own texture or vertex colours. topology: `ops.antialias_topology` of all faces in a row, when it is known.
    two_sided: normals turn towards the camera, for meshes whose winding is not to be trusted.
    Gradients to vertices (through silhouettes too), normals, colours, texture, lights and material.
    """
    device = cameras.device
    counts = [len(mesh.vertices) for mesh in meshes]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    vertices = torch.cat([mesh.vertices for mesh in meshes])
    faces = torch.cat([mesh.faces.int() + start for mesh, start in zip(meshes, starts)]).contiguous()
    normals = torch.cat([_normals(mesh) for mesh in meshes])
    clip = clip_positions(vertices, cameras).contiguous()
    shape = (len(cameras), cameras.height, cameras.width)
    rast, rast_db = ops.rasterize(clip, faces, shape[1:])
    attributes, _ = ops.interpolate(torch.cat([vertices, normals], 1)[None].contiguous(), rast, faces)
    positions, normals = attributes[..., :3], torch.nn.functional.normalize(attributes[..., 3:], dim=-1, eps=1e-12)
    seen = (rast[..., 3:] > 0).to(rast.dtype)
    if two_sided:
        towards = cameras.position[:, None, None] - positions
        normals = torch.where((normals * towards).sum(-1, keepdim=True) < 0, -normals, normals)

    if material is not None:
        albedo = material(positions.reshape(-1, 3)).reshape(positions.shape)
    else:
        albedo, first = torch.zeros_like(positions), 0
        for mesh in meshes:
            albedo = albedo + _albedo(mesh, _only(rast, first, len(mesh.faces)), rast_db)
            first += len(mesh.faces)
    if mode == "albedo":
        color = albedo
    else:
        if lights is None:
            raise ValueError(f"lights: expected one, or one for each camera, with mode {mode!r}, got None")
        views = torch.arange(shape[0], device=device).repeat_interleave(shape[1] * shape[2])
        flat = [x.reshape(-1, 3) for x in (albedo, normals, positions)]
        color = shade(*flat, lights, views, mode).reshape(positions.shape)

    if background.dim() == 2:
        background = background[:, None, None].expand(*shape, 3)
    color = torch.where(seen > 0, color, background.flip(1))
    blended = ops.antialias(torch.cat([color, seen], -1).contiguous(), rast, clip, faces, topology)
    matrix = cameras.world_to_camera()[:, None, None, 2]
    depth = -((positions * matrix[..., :3]).sum(-1) + matrix[..., 3]) * seen[..., 0]
    images = (blended[..., :3], blended[..., 3], normals * seen, depth)
    return MeshRendering(*(image.flip(1) for image in images))


def _normals(mesh: TexturedMesh) -> Tensor:
    """Given normals, or the mean of the faces around each vertex, weighted by area."""
    if mesh.normals is not None:
        return mesh.normals
    corners = mesh.faces.long()
    a, b, c = (mesh.vertices[corners[:, k]] for k in range(3))
    vectors = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(mesh.vertices)
    for k in range(3):
        total = total.index_add(0, corners[:, k], vectors)
    return torch.nn.functional.normalize(total, dim=-1, eps=1e-20)


def _only(rast: Tensor, first: int, count: int) -> Tensor:
    """rast with the triangles first .. first + count - 1 renumbered from 1, and everything else background."""
    ids = decode_triangle_ids(rast[..., 3]) - first
    inside = ((ids >= 0) & (ids < count))[..., None]
    only = torch.cat([rast[..., :3], encode_triangle_ids(ids)[..., None]], -1)
    return torch.where(inside, only, torch.zeros_like(rast)).contiguous()


def _albedo(mesh: TexturedMesh, rast: Tensor, rast_db: Tensor) -> Tensor:
    """[B, H, W, 3] of one mesh's own texture or colours, 0 elsewhere."""
    seen = rast[..., 3:] > 0
    if mesh.texture is not None and mesh.uv is not None:
        uv, uv_da = ops.interpolate(mesh.uv[None].contiguous(), rast, mesh.uv_faces.int().contiguous(), rast_db, "all")
        texture = mesh.texture.flip(0)[None].contiguous()
        levels, (height, width) = 0, texture.shape[1:3]
        while height % 2 == 0 and width % 2 == 0:
            levels, height, width = levels + 1, height // 2, width // 2
        return ops.texture(texture, uv, uv_da, boundary_mode="clamp", max_mip_level=levels) * seen
    if mesh.colors is not None:
        return ops.interpolate(mesh.colors[None].contiguous(), rast, mesh.faces.int().contiguous())[0]
    return PLAIN * seen.to(rast.dtype).expand(*seen.shape[:3], 3)
