"""Textures of an atlas: colours, and normals in the surface's own frame."""

import dataclasses
from collections.abc import Callable

import torch

from text3d_fast import ops
from text3d_fast.geometry.extract import sample_colors
from text3d_fast.geometry.mesh import Mesh


@torch.no_grad()
def bake_texture(
    mesh: Mesh, color_fn: Callable[[torch.Tensor], torch.Tensor], texture_size: int = 1024, dilate: int = 4
) -> Mesh:
    """The same mesh with a texture: color_fn at the surface point of each texel of the atlas.

    color_fn: points [N, 3] -> colours [N, 3] in [0, 1], unlit. dilate: texels by which charts grow beyond their edges,
    so that filtering at seams finds no background; the rest takes the mean colour.
    Raises ValueError without an atlas, or for colours of wrong shape or not finite.
    """
    rast, filled = _rasterized(mesh, texture_size)
    colors = sample_colors(color_fn, _at_texels(mesh.vertices, rast, mesh.faces, filled))
    return dataclasses.replace(mesh, texture=_painted(colors, filled, texture_size, dilate))


@torch.no_grad()
def bake_normals(
    mesh: Mesh, normal_fn: Callable[[torch.Tensor], torch.Tensor], texture_size: int = 1024, dilate: int = 4
) -> Mesh:
    """The same mesh with a normal map: the normals of a finer surface, such as a field's, seen from this one's.

    normal_fn: points [N, 3] -> normals [N, 3] in the mesh's coordinates, of any length. The map holds them in glTF's
    frame (x along u, y along v, z outwards), from -1..1 to 0..1; a normal that looks inwards or has no length becomes
    (0, 0, 1). Raises ValueError without an atlas, or for normals of wrong shape or not finite.
    """
    rast, filled = _rasterized(mesh, texture_size)
    mesh = mesh if mesh.normals is not None else mesh.with_normals()
    points = _at_texels(mesh.vertices, rast, mesh.faces, filled)
    fine = torch.cat([normal_fn(part) for part in points.split(1 << 18)]) if len(points) else points
    if fine.shape != points.shape:
        raise ValueError(f"normal_fn: expected a tensor of shape {list(points.shape)}, got {list(fine.shape)}")
    if not bool(torch.isfinite(fine).all()):
        raise ValueError("normal_fn: expected finite normals, got NaN or infinity")
    unit = torch.nn.functional.normalize
    outwards = unit(_at_texels(mesh.normals, rast, mesh.faces, filled), dim=1)
    frame = _at_texels(mesh.tangents(), rast, mesh.uv_faces, filled)
    along = frame[:, :3] - (frame[:, :3] * outwards).sum(1, keepdim=True) * outwards
    along = unit(along, dim=1)
    up = torch.sign(frame[:, 3:]) * torch.linalg.cross(outwards, along)
    local = torch.stack([(axis * fine).sum(1) for axis in (along, up, outwards)], 1)
    local = torch.where(local[:, 2:] > 0, unit(local, dim=1, eps=1e-30), local.new_tensor([0.0, 0.0, 1.0]))
    return dataclasses.replace(mesh, normal_map=_painted(0.5 + 0.5 * local, filled, texture_size, dilate))


def nearest_normals(mesh: Mesh, count: int = 3) -> Callable[[torch.Tensor], torch.Tensor]:
    """For `bake_normals`: the smooth normal of a fine mesh beside any point, points [N, 3] -> normals [N, 3].

    The mean of those of the `count` nearest vertices, weighted by the inverse of their squared distances.
    """
    from scipy.spatial import cKDTree

    fine = mesh if mesh.normals is not None else mesh.with_normals()
    tree, normals = cKDTree(fine.vertices.detach().cpu().numpy()), fine.normals.detach()
    count = min(count, len(fine.vertices))

    def normal(points: torch.Tensor) -> torch.Tensor:
        distance, vertex = tree.query(points.detach().cpu().numpy(), k=range(1, count + 1), workers=-1)
        weight = torch.from_numpy(distance).square().clamp(min=1e-30).reciprocal()
        weight = (weight / weight.sum(1, keepdim=True)).to(normals)
        return (normals[torch.from_numpy(vertex).to(normals.device)] * weight[..., None]).sum(1)

    return normal


def _rasterized(mesh: Mesh, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """rast [1, size, size, 4] of the atlas, v upwards as `ops.rasterize` has it, and the texels [N] whose centres lie
    in a triangle, as row * size + column."""
    if mesh.uv is None:
        raise ValueError("mesh: expected one with an atlas (call unwrap first)")
    if size < 1:
        raise ValueError(f"texture_size: expected a positive int, got {size}")
    if len(mesh.faces) == 0:
        return mesh.vertices.new_zeros(1, size, size, 4), torch.zeros(0, dtype=torch.int64, device=mesh.uv.device)
    flat = torch.cat([2 * mesh.uv - 1, torch.zeros_like(mesh.uv[:, :1]), torch.ones_like(mesh.uv[:, :1])], 1)
    rast, _ = ops.rasterize(flat[None].float(), mesh.uv_faces.int().contiguous(), (size, size), grad_db=False)
    return rast, rast[..., 3].reshape(-1).nonzero()[:, 0]


def _at_texels(values: torch.Tensor, rast: torch.Tensor, faces: torch.Tensor, filled: torch.Tensor) -> torch.Tensor:
    if len(filled) == 0:
        return values.new_zeros(0, values.shape[1])
    found, _ = ops.interpolate(values[None].float().contiguous(), rast, faces.int().contiguous())
    return found.view(-1, values.shape[1])[filled]


def _painted(values: torch.Tensor, filled: torch.Tensor, size: int, rounds: int) -> torch.Tensor:
    """[size, size, 3], row 0 at the top: values at the filled texels; beside them, for so many rounds, the mean of
    their neighbours; the mean of all elsewhere."""
    texture = values.new_zeros(size * size, 3)
    mask = values.new_zeros(size * size)
    if len(filled):
        texture[:] = values.mean(0)
        texture[filled], mask[filled] = values, 1.0
    kernel = texture.new_ones(1, 1, 3, 3)
    image, mask = texture.view(size, size, 3).permute(2, 0, 1)[:, None], mask.view(1, 1, size, size)
    for _ in range(rounds):
        near = torch.nn.functional.conv2d(mask, kernel, padding=1)
        mean = torch.nn.functional.conv2d(image * mask, kernel, padding=1) / near.clamp(min=1)
        image = torch.where((mask == 0) & (near > 0), mean, image)
        mask = (near > 0).to(mask.dtype)
    return image[:, 0].permute(1, 2, 0).flip(0).contiguous()
