"""UV atlas and texture baking."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from text3d_fast.geometry.extract import sample_colors
from text3d_fast.geometry.mesh import Mesh


def unwrap(mesh: Mesh, texture_size: int = 1024, padding: int = 2) -> Mesh:
    """The same mesh with a UV atlas by xatlas, for a square texture with `padding` free texels around each chart.

    Takes about 0.1 ms a face. Vertices and faces stay as they are: seams are in uv_faces only.
    """
    import xatlas

    if texture_size < 1:
        raise ValueError(f"texture_size: expected a positive int, got {texture_size}")
    if len(mesh.faces) == 0:
        return dataclasses.replace(mesh, uv=mesh.vertices.new_zeros(0, 2), uv_faces=mesh.faces.clone())
    atlas = xatlas.Atlas()
    atlas.add_mesh(mesh.vertices.detach().cpu().float().numpy(), mesh.faces.cpu().numpy().astype(np.uint32))
    packing = xatlas.PackOptions()
    packing.resolution, packing.padding, packing.bilinear = texture_size, padding, True
    atlas.generate(xatlas.ChartOptions(), packing)
    _, faces, uv = atlas[0]
    device = mesh.vertices.device
    uv = torch.from_numpy(np.ascontiguousarray(uv, np.float32)).to(device)
    # The atlas need not be square; one scale for both axes keeps texels square.
    uv = uv * uv.new_tensor([atlas.width, atlas.height]) / max(atlas.width, atlas.height)
    return dataclasses.replace(mesh, uv=uv, uv_faces=torch.from_numpy(faces.astype(np.int32)).to(device))


@torch.no_grad()
def bake_texture(
    mesh: Mesh, color_fn: Callable[[torch.Tensor], torch.Tensor], texture_size: int = 1024, dilate: int = 4
) -> Mesh:
    """The same mesh with a texture: color_fn at the surface point of each texel of the atlas.

    color_fn: points [N, 3] -> colours [N, 3] in [0, 1], unlit. dilate: texels by which charts grow beyond their edges,
    so that filtering at seams finds no background; the rest takes the mean colour.
    Raises ValueError without an atlas, or for colours of wrong shape or not finite.
    """
    if mesh.uv is None:
        raise ValueError("mesh: expected one with an atlas (call unwrap first)")
    texels, faces, weights = rasterize_atlas(mesh.uv, mesh.uv_faces, texture_size)
    points = (mesh.corners()[faces] * weights[..., None]).sum(1)
    texture = points.new_zeros(texture_size * texture_size, 3)
    filled = torch.zeros(texture_size * texture_size, dtype=torch.bool, device=points.device)
    if len(texels):
        colors = sample_colors(color_fn, points)
        texture[:] = colors.mean(0)
        texture[texels], filled[texels] = colors, True
    texture = _dilate(texture.view(texture_size, texture_size, 3), filled.view(texture_size, texture_size), dilate)
    return dataclasses.replace(mesh, texture=texture)


def rasterize_atlas(
    uv: torch.Tensor, uv_faces: torch.Tensor, size: int, pairs: int = 1 << 22
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The texels whose centres lie in a triangle: index (row from the top * size + column), face, barycentric [., 3].

    Of two triangles that share a centre the one with the larger index gets it.
    """
    corners = uv[uv_faces.long()] * size - 0.5  # texel centres at whole numbers, rows still from the bottom
    low = corners.amin(1).ceil().clamp(0, size).long()
    high = corners.amax(1).floor().clamp(-1, size - 1).long() + 1
    extent = (high - low).clamp(min=0)
    counts = extent[:, 0] * extent[:, 1]
    owner = torch.full((size * size,), -1, dtype=torch.int64, device=uv.device)
    # Triangles in runs of about `pairs` candidate texels: memory stays bounded.
    run = torch.div(counts.cumsum(0) - counts, pairs, rounding_mode="floor")
    _, lengths = torch.unique_consecutive(run, return_counts=True)
    for members in torch.arange(len(counts), device=uv.device).split(lengths.tolist()):
        face = torch.repeat_interleave(members, counts[members])
        start = torch.repeat_interleave(counts[members].cumsum(0) - counts[members], counts[members])
        offset = torch.arange(len(face), device=uv.device) - start
        column = low[face, 0] + offset % extent[face, 0]
        row = low[face, 1] + offset // extent[face, 0]
        inside = (_barycentric(corners[face], column, row) >= -1e-5).all(-1)
        owner.scatter_reduce_(0, row[inside] * size + column[inside], face[inside], "amax")
    found = (owner >= 0).nonzero()[:, 0]
    row, column, face = found // size, found % size, owner[found]
    weights = _barycentric(corners[face], column, row).clamp(0, 1)
    return (size - 1 - row) * size + column, face, weights / weights.sum(-1, keepdim=True)


def _barycentric(corners: torch.Tensor, column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    point = torch.stack([column, row], -1).to(corners.dtype)
    to = corners - point[:, None]

    def cross(i: int, j: int) -> torch.Tensor:
        return to[:, i, 0] * to[:, j, 1] - to[:, i, 1] * to[:, j, 0]

    areas = torch.stack([cross(1, 2), cross(2, 0), cross(0, 1)], -1)
    total = areas.sum(-1, keepdim=True)
    return torch.where(total.abs() > 1e-12, areas / total, torch.full_like(areas, -1.0))


def _dilate(texture: torch.Tensor, filled: torch.Tensor, rounds: int) -> torch.Tensor:
    """Texels beside filled ones take the mean of those, round by round."""
    kernel = texture.new_ones(1, 1, 3, 3)
    image, mask = texture.permute(2, 0, 1)[:, None], filled[None, None].to(texture.dtype)
    for _ in range(rounds):
        near = torch.nn.functional.conv2d(mask, kernel, padding=1)
        mean = torch.nn.functional.conv2d(image * mask, kernel, padding=1) / near.clamp(min=1)
        image = torch.where((mask == 0) & (near > 0), mean, image)
        mask = (near > 0).to(mask.dtype)
    return image[:, 0].permute(1, 2, 0).contiguous()
