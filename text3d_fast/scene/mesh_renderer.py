"""Pictures of triangle meshes: rasterize, interpolate, texture, shade, antialias. Differentiable in the vertices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

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
    layers = _layers(meshes, rast, rast_db)
    for layer in layers:
        if layer.mesh.normal_map is not None and layer.mesh.uv is not None:
            normals = layer.mapped(normals, pixels)
    if two_sided:
        away = (normals * (cameras.position[views] - positions)).sum(-1, keepdim=True) < 0
        normals = torch.where(away, -normals, normals)
    if mode == "normals":
        color = 0.5 + 0.5 * normals
    else:
        if material is not None:
            albedo = material(positions)
        else:
            albedo = sum(_Pick.apply(layer.albedo(), pixels) for layer in layers)
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


def _layers(meshes: Sequence[Mesh], rast: Tensor, rast_db: Tensor) -> list[_Layer]:
    firsts = [sum(len(mesh.faces) for mesh in meshes[:i]) for i in range(len(meshes))]
    return [_Layer(mesh, rast, rast_db, None if len(meshes) == 1 else first) for mesh, first in zip(meshes, firsts)]


class _Layer:
    """One mesh of a picture: where it is seen and what its images show there, each found when first asked for.

    first: number of its first triangle in the picture; None: the picture has no other mesh
    """

    def __init__(self, mesh: Mesh, rast: Tensor, rast_db: Tensor, first: int | None):
        self.mesh, self._all, self._rast_db, self._first = mesh, rast, rast_db, first

    @cached_property
    def rast(self) -> Tensor:
        """That of the picture with the mesh's triangles numbered from 1, and everything else background."""
        if self._first is None:
            return self._all
        ids = decode_triangle_ids(self._all[..., 3]) - self._first
        inside = ((ids >= 0) & (ids < len(self.mesh.faces)))[..., None]
        own = torch.cat([self._all[..., :3], encode_triangle_ids(ids)[..., None]], -1)
        return torch.where(inside, own, torch.zeros_like(own)).contiguous()

    @property
    def seen(self) -> Tensor:
        """bool [B, H, W, 1]."""
        return self.rast[..., 3:] > 0

    @cached_property
    def place(self) -> tuple[Tensor, Tensor]:
        """Each pixel's place in the atlas, and the place's derivatives."""
        uv, faces = self.mesh.uv[None].contiguous(), self.mesh.uv_faces.int().contiguous()
        return ops.interpolate(uv, self.rast, faces, self._rast_db, "all")

    def albedo(self) -> Tensor:
        """[B * H * W, 3] of its own texture or colours, 0 elsewhere."""
        mesh = self.mesh
        if mesh.texture is not None and mesh.uv is not None:
            return self.sampled(mesh.texture)
        if mesh.colors is not None:
            colors, _ = ops.interpolate(mesh.colors[None].contiguous(), self.rast, mesh.faces.int().contiguous())
            return colors.view(-1, 3)
        return PLAIN * self.seen.to(self.rast.dtype).view(-1, 1).expand(-1, 3)

    def sampled(self, image: Tensor) -> Tensor:
        """[B * H * W, 3] of an image [h, w, 3] in the atlas, 0 elsewhere."""
        image = image.flip(0)[None].contiguous()
        levels, (height, width) = 0, image.shape[1:3]
        while height % 2 == 0 and width % 2 == 0:
            levels, height, width = levels + 1, height // 2, width // 2
        color = ops.texture(image, *self.place, boundary_mode="clamp", max_mip_level=levels) * self.seen
        return color.view(-1, 3)

    def mapped(self, normals: Tensor, pixels: Tensor) -> Tensor:
        """Unit normals [P, 3] of the pixels, where it is seen those of its normal map (glTF 2.0, section 3.9.3)."""
        mesh = self.mesh
        x, y, z = (2 * _Pick.apply(self.sampled(mesh.normal_map), pixels) - 1).split(1, -1)
        frame, _ = ops.interpolate(mesh.tangents()[None].contiguous(), self.rast, mesh.uv_faces.int().contiguous())
        along, sign = _Pick.apply(frame.view(-1, 4), pixels).split((3, 1), -1)
        along = torch.nn.functional.normalize(along, dim=-1, eps=1e-12)
        fine = x * along + y * torch.sign(sign) * torch.linalg.cross(normals, along) + z * normals
        fine = torch.nn.functional.normalize(fine, dim=-1, eps=1e-12)
        return torch.where(self.seen.view(-1, 1)[pixels], fine, normals)
