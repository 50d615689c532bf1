"""A UV atlas by xatlas."""

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
