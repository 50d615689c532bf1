"""Fewer faces for the same shape."""

import numpy as np
import torch

from text3d_fast.geometry.mesh import Mesh


def decimate(mesh: Mesh, faces: int) -> Mesh:
    """About the same surface with at most `faces` triangles, by quadric edge collapse (Garland and Heckbert 1997).

    Vertices and faces only: normals, colours and atlas are made anew afterwards. A mesh that has no more faces than
    asked for is returned as it is. Raises ValueError for fewer than 4, RuntimeError without fast-simplification.
    """
    if faces < 4:
        raise ValueError(f"faces: expected at least 4, got {faces}")
    if len(mesh.faces) <= faces:
        return mesh
    try:
        from fast_simplification import simplify
    except ImportError:
        raise RuntimeError("fewer faces need fast-simplification: pip install fast-simplification") from None
    points = mesh.vertices.detach().cpu().double().numpy()
    centre, extent = points.mean(0), max(float(np.ptp(points)), 1e-30)  # its float32 likes coordinates around 1
    points, triangles = simplify(((points - centre) / extent).astype(np.float32), mesh.faces.cpu().numpy(),
                                 target_count=faces)
    vertices = torch.from_numpy(np.asarray(points, np.float64) * extent + centre).to(mesh.vertices)
    corners = torch.from_numpy(np.asarray(triangles, np.int64)).to(mesh.faces)
    return Mesh(vertices, corners).select_faces(torch.ones(len(corners), dtype=torch.bool, device=corners.device))
