"""A UV atlas by xatlas, and its tangents."""

import dataclasses

import numpy as np
import torch

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


def tangents(mesh: Mesh) -> torch.Tensor:
    """[U, 4]: for each row of the atlas the unit direction of growing u, at right angles to the vertex normal, and the
    sign (1 or -1) for which sign * cross(normal, tangent) is that of growing v, as glTF's TANGENT.

    The mean of the faces around, weighted by area; some perpendicular where the atlas has none.
    """
    if mesh.uv is None or mesh.normals is None:
        raise ValueError("mesh: expected one with an atlas and normals (call unwrap and with_normals first)")
    rows = mesh.uv_faces.long()
    positions, places = mesh.corners().double(), mesh.uv[rows].double()
    edge, other = positions[:, 1] - positions[:, 0], positions[:, 2] - positions[:, 0]
    (u1, v1), (u2, v2) = (places[:, 1] - places[:, 0]).unbind(1), (places[:, 2] - places[:, 0]).unbind(1)
    turn = torch.sign(u1 * v2 - u2 * v1)
    along = (edge * v2[:, None] - other * v1[:, None]) * turn[:, None]
    area = mesh.area_vectors().double().norm(dim=1, keepdim=True)
    along = torch.nn.functional.normalize(along, dim=1, eps=1e-300) * area
    total = along.new_zeros(len(mesh.uv), 4)
    normal = along.new_zeros(len(mesh.uv), 3)
    for corner in range(3):
        total.index_add_(0, rows[:, corner], torch.cat([along, (turn * area[:, 0])[:, None]], 1))
        normal[rows[:, corner]] = mesh.normals[mesh.faces[:, corner].long()].double()
    tangent = _perpendicular(total[:, :3], normal)
    lost = tangent.norm(dim=1, keepdim=True) < 0.5
    axis = torch.nn.functional.one_hot(normal.abs().argmin(1), 3).to(normal)  # never parallel to the normal
    tangent = torch.where(lost, _perpendicular(axis, normal), tangent)
    return torch.cat([tangent, torch.where(total[:, 3:] < 0, -1.0, 1.0)], 1).to(mesh.vertices.dtype)


def _perpendicular(vector: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
    vector = torch.nn.functional.normalize(vector, dim=1, eps=1e-300)
    vector = vector - (vector * normal).sum(1, keepdim=True) * normal
    length = vector.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-6, vector / length.clamp(min=1e-6), torch.zeros_like(vector))
