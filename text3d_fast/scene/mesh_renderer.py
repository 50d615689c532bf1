"""Pictures of triangle meshes: rasterize, interpolate, texture, shade, antialias. Differentiable in the vertices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from text3d_fast import ops
from text3d_fast.geometry.mesh import Mesh
from text3d_fast.geometry.normals import vertex_normals
from text3d_fast.reference.rasterize import decode_triangle_ids, encode_triangle_ids
from text3d_fast.scene.cameras import Cameras
from text3d_fast.scene.lights import Lights
from text3d_fast.scene.shading import shade

PLAIN = 0.75  # grey of a mesh that has no colours


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
    meshes: Sequence[Mesh],
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
    modes are those of `shading.shade`) and "normals" (n / 2 + 1 / 2 in the world). material: albedo [N, 3] at world
    positions [N, 3], instead of the meshes' own texture or vertex colours; only pixels that see something ask it.
    topology: `ops.antialias_topology` of all faces in a row, when it is known.
    two_sided: normals turn towards the camera, for meshes whose winding is not to be trusted.
    Meshes without normals get smooth ones, weighted by area as an optimization needs them (`geometry.vertex_normals`).
    Gradients to vertices (through silhouettes too), normals, colours, texture, lights and material. Meshes without
    faces are legal, and nothing is seen of them. One host synchronization, for the number of visible pixels.
    """
    counts = [len(mesh.vertices) for mesh in meshes]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    vertices = torch.cat([mesh.vertices for mesh in meshes])
    faces = torch.cat([mesh.faces.int() + start for mesh, start in zip(meshes, starts)]).contiguous()
    normals = torch.cat([
        vertex_normals(mesh.vertices, mesh.faces, "area") if mesh.normals is None else mesh.normals for mesh in meshes
    ])
    clip = clip_positions(vertices, cameras).contiguous()
    shape = (len(cameras), cameras.height, cameras.width)
    textured = any(mesh.normal_map is not None or (material is None and mesh.texture is not None) for mesh in meshes)
    rast, rast_db = ops.rasterize(clip, faces, shape[1:], grad_db=textured)
    attributes, _ = ops.interpolate(torch.cat([vertices, normals], 1)[None].contiguous(), rast, faces)

    # From here on only the pixels that see something, [P, ...].
    pixels = rast[..., 3].reshape(-1).nonzero()[:, 0]
    views = pixels // (shape[1] * shape[2])
    positions, normals = _Pick.apply(attributes.view(-1, 6), pixels).split(3, -1)
    normals = torch.nn.functional.normalize(normals, dim=-1, eps=1e-12)
    first = 0
    for mesh in meshes:
        if mesh.normal_map is not None and mesh.uv is not None:
            normals = _mapped(mesh, normals, _only(rast, first, len(mesh.faces)), rast_db, pixels)
        first += len(mesh.faces)
    if two_sided:
        away = (normals * (cameras.position[views] - positions)).sum(-1, keepdim=True) < 0
        normals = torch.where(away, -normals, normals)
    if mode == "normals":
        color = 0.5 + 0.5 * normals
    else:
        if material is not None:
            albedo = material(positions)
        else:
            albedo, first = torch.zeros_like(positions), 0
            for mesh in meshes:
                albedo = albedo + _Pick.apply(_albedo(mesh, _only(rast, first, len(mesh.faces)), rast_db), pixels)
                first += len(mesh.faces)
        if mode != "albedo" and lights is None:
            raise ValueError(f"lights: expected one, or one for each camera, with mode {mode!r}, got None")
        color = shade(albedo, normals, positions, lights, views, mode)

    if background.dim() == 2:
        background = background[:, None, None]
    background = background.flip(1).expand(*shape, 3).reshape(-1, 3)
    covered = torch.zeros_like(background[:, :1]).index_fill(0, pixels, 1.0)
    canvas = torch.cat([background.index_copy(0, pixels, color), covered], -1)
    blended = ops.antialias(canvas.view(*shape, 4), rast, clip, faces, topology).flip(1)
    axis = cameras.world_to_camera()[views, 2]
    depth = -((positions * axis[:, :3]).sum(-1, keepdim=True) + axis[:, 3:])
    flat = torch.zeros_like(canvas).index_copy(0, pixels, torch.cat([normals, depth], -1)).view(*shape, 4).flip(1)
    return MeshRendering(blended[..., :3], blended[..., 3], flat[..., :3], flat[..., 3])


class _Pick(torch.autograd.Function):
    """rows [P] of x [N, C], every row at most once, which makes the gradient a copy instead of a sum."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, grad.shape[1]).index_copy_(0, rows, grad), None


def _only(rast: Tensor, first: int, count: int) -> Tensor:
    """rast with the triangles first .. first + count - 1 renumbered from 1, and everything else background."""
    ids = decode_triangle_ids(rast[..., 3]) - first
    inside = ((ids >= 0) & (ids < count))[..., None]
    only = torch.cat([rast[..., :3], encode_triangle_ids(ids)[..., None]], -1)
    return torch.where(inside, only, torch.zeros_like(rast)).contiguous()


def _albedo(mesh: Mesh, rast: Tensor, rast_db: Tensor) -> Tensor:
    """[B * H * W, 3] of one mesh's own texture or colours, 0 elsewhere."""
    if mesh.texture is not None and mesh.uv is not None:
        return _sampled(mesh, mesh.texture, rast, rast_db)
    if mesh.colors is not None:
        return ops.interpolate(mesh.colors[None].contiguous(), rast, mesh.faces.int().contiguous())[0].view(-1, 3)
    return PLAIN * (rast[..., 3:] > 0).to(rast.dtype).view(-1, 1).expand(-1, 3)


def _sampled(mesh: Mesh, image: Tensor, rast: Tensor, rast_db: Tensor) -> Tensor:
    """[B * H * W, 3] of an image [h, w, 3] in the mesh's atlas, 0 elsewhere."""
    uv, uv_da = ops.interpolate(mesh.uv[None].contiguous(), rast, mesh.uv_faces.int().contiguous(), rast_db, "all")
    image = image.flip(0)[None].contiguous()
    levels, (height, width) = 0, image.shape[1:3]
    while height % 2 == 0 and width % 2 == 0:
        levels, height, width = levels + 1, height // 2, width // 2
    color = ops.texture(image, uv, uv_da, boundary_mode="clamp", max_mip_level=levels) * (rast[..., 3:] > 0)
    return color.view(-1, 3)


def _mapped(mesh: Mesh, normals: Tensor, rast: Tensor, rast_db: Tensor, pixels: Tensor) -> Tensor:
    """Unit normals [P, 3] of the pixels, where the mesh is seen those of its normal map (glTF 2.0, section 3.9.3)."""
    x, y, z = (2 * _Pick.apply(_sampled(mesh, mesh.normal_map, rast, rast_db), pixels) - 1).split(1, -1)
    frame, _ = ops.interpolate(mesh.tangents()[None].contiguous(), rast, mesh.uv_faces.int().contiguous())
    along, sign = _Pick.apply(frame.view(-1, 4), pixels).split((3, 1), -1)
    along = torch.nn.functional.normalize(along, dim=-1, eps=1e-12)
    fine = x * along + y * torch.sign(sign) * torch.linalg.cross(normals, along) + z * normals
    seen = (rast[..., 3:] > 0).view(-1, 1)[pixels]
    return torch.where(seen, torch.nn.functional.normalize(fine, dim=-1, eps=1e-12), normals)
