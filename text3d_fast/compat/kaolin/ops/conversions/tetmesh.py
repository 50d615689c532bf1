"""kaolin's marching tetrahedra on `ops.marching_tets`: the same vertices, faces and order."""

import contextlib

import torch
from torch.utils.weak import WeakIdKeyDictionary

from text3d_fast import ops, use_backend

__all__ = ["marching_tetrahedra"]

_grids: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tets -> (version, vertices, grid); connectivity is slow to find


def marching_tetrahedra(
    vertices: torch.Tensor, tets: torch.Tensor, sdf: torch.Tensor, return_tet_idx: bool = False
) -> list[tuple[torch.Tensor, ...]]:
    """Surfaces sdf = 0 of a batch of tetrahedral meshes of one topology; sdf > 0 is inside.

    vertices: float [B, V, 3]; tets: int64 [T, 4]; sdf: float [B, V]. Gradients to vertices and sdf.
    Returns a list of tuples with one tensor for each mesh: vertices [N, 3]; faces int64 [M, 3]; and, if
    `return_tet_idx`, the tet that each face lies in, int64 [M]. With positively oriented tets faces wind inward, as in
    kaolin. The connectivity of `tets` is kept as long as that tensor lives and is not written to.
    Raises ValueError or TypeError for wrong shapes and types, ValueError if sdf is not finite.
    """
    if vertices.dim() != 3 or vertices.shape[2] != 3:
        raise ValueError(f"vertices: expected shape [B, V, 3], got {list(vertices.shape)}")
    if sdf.shape != vertices.shape[:2]:
        raise ValueError(f"sdf: expected shape {list(vertices.shape[:2])}, got {list(sdf.shape)}")
    if not len(vertices):
        return []
    grid = _grid(vertices[0], tets)
    single = vertices.dtype == sdf.dtype == torch.float32
    with contextlib.nullcontext() if single else use_backend("reference"):  # which alone takes other precisions
        outputs = [_extract(positions, values, grid, tets, return_tet_idx) for positions, values in zip(vertices, sdf)]
    return list(zip(*outputs))


def _grid(positions: torch.Tensor, tets: torch.Tensor) -> ops.TetGrid:
    version = None if tets.is_inference() else tets._version
    key = version, len(positions), positions.device
    known = _grids.get(tets)
    if known is None or version is None or known[0] != key:
        known = key, ops.TetGrid.from_tets(positions.detach().float(), tets)
        _grids[tets] = known
    return known[1]


def _extract(positions, sdf, grid, tets, return_tet_idx):
    vertices, faces = ops.marching_tets(positions, sdf, grid)
    if not return_tet_idx:
        return vertices, faces.long()
    inside = (sdf.detach() > 0)[tets].sum(1)
    one, two = ((inside == 1) | (inside == 3)).nonzero()[:, 0], (inside == 2).nonzero()[:, 0]
    return vertices, faces.long(), torch.cat((one, two.repeat_interleave(2)))
