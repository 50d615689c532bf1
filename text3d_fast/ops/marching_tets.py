"""Triangle meshes from signed distances on a tetrahedral grid."""

import torch

from text3d_fast.ops.checks import require_same_device, require_tensor
from text3d_fast.ops.tet_grid import TetGrid
from text3d_fast.reference.marching_tets import marching_tets as reference_marching_tets


def marching_tets(positions: torch.Tensor, sdf: torch.Tensor, grid: TetGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Extract the surface sdf = 0 as triangles (Doi and Koide 1991; differentiable as in DMTet, Shen et al. 2021).

    positions: float [V, 3], the grid's vertices, deformed or not (`grid.positions`); sdf: float [V], positive inside,
    0 counts as outside; grid: the connectivity.
    Returns vertices [N, 3], one for each edge whose ends differ in sign, at p0 + s0 / (s0 - s1) (p1 - p0), in
    lexicographic order of the edge's (smaller, larger) vertex; and faces int32 [M, 3]: those of tets with one triangle
    first, then those of tets with two, each in the order of the tets (kaolin's order). With the built-in grids faces
    are counter-clockwise seen from outside.
    If every vertex on the grid's boundary is outside, the mesh is a closed oriented manifold; values of exactly 0 can
    make triangles without area.
    Gradients to positions and sdf; they grow as 1 / (s0 - s1).
    Raises ValueError or TypeError for wrong shapes, dtypes or devices, ValueError if sdf is not finite.
    """
    require_tensor("positions", positions, (grid.num_vertices, 3))
    require_tensor("sdf", sdf, (grid.num_vertices,), positions.dtype)
    require_same_device(positions=positions, sdf=sdf, grid=grid.positions)
    if not bool(torch.isfinite(sdf.detach()).all()):
        raise ValueError("sdf: expected finite values, got NaN or infinity")
    return reference_marching_tets(positions, sdf, grid.tets)
