"""Triangle meshes from signed distances on a tetrahedral grid."""

import torch

from text3d_fast import backends, native
from text3d_fast.ops.checks import check_values, float_dtypes, require_same_device, require_tensor
from text3d_fast.ops.registration import LastOrder, define
from text3d_fast.ops.tet_grid import TetGrid
from text3d_fast.ops.typed import typed
from text3d_fast.reference.marching_tets import marching_tets as reference_marching_tets

backends.declare("marching_tets", triton=True)


@typed
def marching_tets(positions: torch.Tensor, sdf: torch.Tensor, grid: TetGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Extract the surface sdf = 0 as triangles (Doi and Koide 1991; differentiable as in DMTet, Shen et al. 2021).

    positions: float32 [V, 3], the grid's vertices, deformed or not (`grid.positions`); sdf: float32 [V], positive
    inside, 0 counts as outside; grid: the connectivity.
    Returns vertices [N, 3], one for each edge whose ends differ in sign, at p0 + s0 / (s0 - s1) (p1 - p0), in
    lexicographic order of the edge's (smaller, larger) vertex; and faces int32 [M, 3]: those of tets with one triangle
    first, then those of tets with two, each in the order of the tets (kaolin's order). With the built-in grids faces
    are counter-clockwise seen from outside.
    If every vertex on the grid's boundary is outside, the mesh is a closed oriented manifold; values of exactly 0 can
    make triangles without area.
    Gradients to positions and sdf, first order, the same in every run; they grow as 1 / (s0 - s1).
    Cost: the sdf is read once, everything else is as large as the surface or a bit a grid vertex; one host
    synchronization, for the sizes. Kept for the backward pass besides the inputs: under 2 bits a grid vertex (Kuhn), or
    1.5 bits an edge.
    Raises ValueError or TypeError for wrong shapes, dtypes or devices, ValueError if sdf is not finite (on a GPU only
    under TEXT3D_CHECK=1; NaN is outside there).
    """
    backend = backends.choose("marching_tets", sdf.device)
    if backend == "reference":
        _check(positions, sdf, grid.num_vertices, grid.positions, backend)
        if not bool(torch.isfinite(sdf.detach()).all()):
            raise ValueError(_NOT_FINITE)
        return reference_marching_tets(positions, sdf, grid.tets)
    if grid.kind == "kuhn":
        return _kuhn(positions, sdf, *grid.resolution, backend)[:2]
    differentiable = torch.is_grad_enabled() and (positions.requires_grad or sdf.requires_grad)
    incidence = grid.incidence if differentiable else [grid.edges.new_empty(0)] * 3  # the backward pass alone reads it
    return _tets(positions, sdf, grid.num_vertices, grid.tets, grid.edges, grid.tet_edges, *incidence, backend)[:2]


def _check(positions, sdf, num_vertices, grid, backend):
    dtypes = float_dtypes(backend)
    require_tensor("positions", positions, (num_vertices, 3), *dtypes)
    require_tensor("sdf", sdf, (num_vertices,), *dtypes)
    require_same_device(positions=positions, sdf=sdf, grid=grid)


def _check_kuhn(positions, sdf, nx, ny, nz, backend):
    _check(positions, sdf, (nx + 1) * (ny + 1) * (nz + 1), None, backend)


def _check_tets(positions, sdf, num_vertices, tets, edges, tet_edges, low_offsets, high_offsets, high_edges, backend):
    _check(positions, sdf, num_vertices, tets, backend)


_NOT_FINITE = "sdf: expected finite values, got NaN or infinity"


def _sizes(bad: torch.Tensor, *offsets: torch.Tensor) -> list[int]:
    """The last column of each row of offsets: the one host synchronization."""
    checked = bad.device.type == "cpu" or check_values()
    *sizes, is_bad = torch.cat([*(o[..., -1].reshape(-1) for o in offsets), bad]).tolist()
    if checked and is_bad:
        raise ValueError(_NOT_FINITE)
    return sizes


def _kuhn_forward(positions, sdf, nx, ny, nz, backend):
    positions, sdf = native.aligned(positions), native.aligned(sdf)
    words = (nx + 1) * (ny + 1) * ((nz + 64) // 64)
    signs = torch.empty(words, dtype=torch.int64, device=sdf.device)
    counts = torch.zeros(3, words + 1, dtype=torch.int32, device=sdf.device)
    bad = torch.zeros(1, dtype=torch.int32, device=sdf.device)
    backends.call(backend, "marching_tets_kuhn_flag", sdf, signs, counts, bad, nx, ny, nz)
    offsets = torch.cumsum(counts, 1, dtype=torch.int32)
    num_vertices, ones, twos = _sizes(bad, offsets)
    vertices = positions.new_empty(num_vertices, 3)
    faces = torch.empty(ones + 2 * twos, 3, dtype=torch.int32, device=sdf.device)
    backends.call(backend, "marching_tets_kuhn_emit", positions, sdf, signs, offsets, vertices, faces, nx, ny, nz)
    return vertices, faces, signs, offsets[0].clone()


def _fake_kuhn_forward(positions, sdf, nx, ny, nz, backend):
    words = (nx + 1) * (ny + 1) * ((nz + 64) // 64)
    context = torch.library.get_ctx()
    vertices = positions.new_empty(context.new_dynamic_size(), 3)
    faces = sdf.new_empty(context.new_dynamic_size(), 3, dtype=torch.int32)
    return vertices, faces, sdf.new_empty(words, dtype=torch.int64), sdf.new_empty(words + 1, dtype=torch.int32)


def _kuhn_backward_kernel(grad, positions, sdf, signs, offsets, nx, ny, nz, with_positions, backend):
    grad, positions, sdf = native.aligned(grad), native.aligned(positions), native.aligned(sdf)
    grad_sdf = torch.zeros_like(sdf)
    grad_positions = torch.zeros_like(positions) if with_positions else positions.new_empty(0, 3)
    backends.call(backend, "marching_tets_kuhn_backward", grad, positions, sdf, signs, offsets,
                  grad_positions if with_positions else None, grad_sdf, nx, ny, nz)
    return grad_positions, grad_sdf


def _fake_backward(grad, positions, sdf, *rest):
    grad_positions = positions.new_empty(positions.shape if rest[-2] else (0, 3))
    return grad_positions, sdf.new_empty(sdf.shape)


class _KuhnDerivative:
    @staticmethod
    def setup_context(ctx, inputs, outputs):
        positions, sdf, *ctx.resolution, ctx.backend = inputs
        ctx.save_for_backward(positions, sdf, *outputs[2:])
        ctx.mark_non_differentiable(*outputs[1:])

    @staticmethod
    def backward(ctx, grad, *_):
        with_positions = ctx.needs_input_grad[0]
        grad_positions, grad_sdf = _kuhn_backward(grad, *ctx.saved_tensors, *ctx.resolution, with_positions,
                                                  ctx.backend)
        return grad_positions if with_positions else None, grad_sdf, *[None] * 4


def _word_count(n):
    return (n + 63) // 64


def _tets_forward(positions, sdf, num_vertices, tets, edges, tet_edges, low_offsets, high_offsets, high_edges, backend):
    positions, sdf, tets, edges, tet_edges = map(native.aligned, (positions, sdf, tets, edges, tet_edges))
    num_tets, num_edges = len(tets), len(edges)
    signs = torch.empty(_word_count(num_vertices), dtype=torch.int64, device=sdf.device)
    crossing = torch.empty(_word_count(num_edges), dtype=torch.int64, device=sdf.device)
    triangles = torch.empty(2, _word_count(num_tets), dtype=torch.int64, device=sdf.device)
    edge_counts = torch.zeros(_word_count(num_edges) + 1, dtype=torch.int32, device=sdf.device)
    tet_counts = torch.zeros(2, _word_count(num_tets) + 1, dtype=torch.int32, device=sdf.device)
    bad = torch.zeros(1, dtype=torch.int32, device=sdf.device)
    backends.call(backend, "marching_tets_flag", sdf, tets, edges, signs, crossing, triangles, edge_counts, tet_counts,
                  bad, num_vertices, num_tets, num_edges)
    edge_offsets = torch.cumsum(edge_counts, 0, dtype=torch.int32)
    tet_offsets = torch.cumsum(tet_counts, 1, dtype=torch.int32)
    count, ones, twos = _sizes(bad, edge_offsets, tet_offsets)
    vertices = positions.new_empty(count, 3)
    faces = torch.empty(ones + 2 * twos, 3, dtype=torch.int32, device=sdf.device)
    backends.call(backend, "marching_tets_emit", positions, sdf, tets, edges, tet_edges, signs, crossing, triangles,
                  edge_offsets, tet_offsets, vertices, faces, num_tets, num_edges)
    return vertices, faces, crossing, edge_offsets


def _fake_tets_forward(positions, sdf, num_vertices, tets, edges, *rest):
    words, context = _word_count(edges.shape[0]), torch.library.get_ctx()
    vertices = positions.new_empty(context.new_dynamic_size(), 3)
    faces = sdf.new_empty(context.new_dynamic_size(), 3, dtype=torch.int32)
    return vertices, faces, sdf.new_empty(words, dtype=torch.int64), sdf.new_empty(words + 1, dtype=torch.int32)


def _tets_backward_kernel(grad, positions, sdf, edges, low_offsets, high_offsets, high_edges, crossing, edge_offsets,
                          with_positions, backend):
    grad, positions, sdf = native.aligned(grad), native.aligned(positions), native.aligned(sdf)
    grad_sdf = sdf.new_empty(sdf.shape)
    grad_positions = positions.new_empty(positions.shape if with_positions else (0, 3))
    backends.call(backend, "marching_tets_backward", grad, positions, sdf, edges, low_offsets, high_offsets, high_edges,
                  crossing, edge_offsets, grad_positions if with_positions else None, grad_sdf, len(sdf))
    return grad_positions, grad_sdf


class _TetsDerivative:
    @staticmethod
    def setup_context(ctx, inputs, outputs):
        positions, sdf, _, _, edges, _, *incidence, ctx.backend = inputs
        ctx.save_for_backward(positions, sdf, edges, *incidence, *outputs[2:])
        ctx.mark_non_differentiable(*outputs[1:])

    @staticmethod
    def backward(ctx, grad, *_):
        with_positions = ctx.needs_input_grad[0]
        grad_positions, grad_sdf = _tets_backward(grad, *ctx.saved_tensors, with_positions, ctx.backend)
        return grad_positions if with_positions else None, grad_sdf, *[None] * 8


_kuhn = define(
    "marching_tets_kuhn(Tensor positions, Tensor sdf, int nx, int ny, int nz, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _kuhn_forward,
    _fake_kuhn_forward,
    _KuhnDerivative,
    _check_kuhn,
)
_kuhn_backward = define(
    "marching_tets_kuhn_backward(Tensor grad, Tensor positions, Tensor sdf, Tensor signs, Tensor offsets, int nx, "
    "int ny, int nz, bool with_positions, str backend) -> (Tensor, Tensor)",
    _kuhn_backward_kernel,
    _fake_backward,
    LastOrder("marching_tets_kuhn_backward"),
)
_tets = define(
    "marching_tets(Tensor positions, Tensor sdf, SymInt num_vertices, Tensor tets, Tensor edges, Tensor tet_edges, "
    "Tensor low_offsets, Tensor high_offsets, Tensor high_edges, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _tets_forward,
    _fake_tets_forward,
    _TetsDerivative,
    _check_tets,
)
_tets_backward = define(
    "marching_tets_backward(Tensor grad, Tensor positions, Tensor sdf, Tensor edges, Tensor low_offsets, "
    "Tensor high_offsets, Tensor high_edges, Tensor crossing, Tensor edge_offsets, bool with_positions, str backend) "
    "-> (Tensor, Tensor)",
    _tets_backward_kernel,
    _fake_backward,
    LastOrder("marching_tets_backward"),
)
