"""ops.marching_tets: topology and orientation of what it extracts, order, gradients, errors."""

import pytest
import torch

from text3d_fast import ops
from text3d_fast.reference.marching_tets import marching_tets as reference_marching_tets


def positive_tets() -> ops.TetGrid:
    a15 = ops.TetGrid.a15(8)
    return ops.TetGrid.from_tets(a15.positions, a15.tets[:, [1, 0, 2, 3]].long())


GRIDS = {
    "kuhn 1": lambda: ops.TetGrid.kuhn(1),
    "kuhn 2x3x5": lambda: ops.TetGrid.kuhn((2, 3, 5)),
    "kuhn 13": lambda: ops.TetGrid.kuhn(13),
    "kuhn 3x2x70": lambda: ops.TetGrid.kuhn((3, 2, 70)),  # more than one 64-bit word of signs along z
    "a15 4": lambda: ops.TetGrid.a15(4),
    "a15 12": lambda: ops.TetGrid.a15(12),
    "tets": lambda: positive_tets(),
}


@pytest.fixture(params=GRIDS)
def grid(request, device) -> ops.TetGrid:
    return GRIDS[request.param]().to(device)


def noise(grid, generator, dtype=torch.float32):
    """A sign change on half of the edges, the boundary outside."""
    sdf = torch.randn(grid.num_vertices, generator=generator, device=grid.device, dtype=dtype)
    boundary = (grid.positions.abs() == 1).any(-1)
    return torch.where(boundary, -sdf.abs(), sdf)


def signed_volume(vertices, faces):
    a, b, c = vertices[faces.long()].unbind(1)
    return (torch.linalg.cross(a, b) * c).sum() / 6


def assert_closed_oriented_manifold(vertices, faces):
    """Each directed edge once, its reverse once; the faces around each vertex form one fan."""
    directed = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).long()
    keys = directed[:, 0] * len(vertices) + directed[:, 1]
    assert len(keys.unique()) == len(keys)
    reverse = directed[:, 1] * len(vertices) + directed[:, 0]
    assert torch.equal(keys.sort().values, reverse.sort().values)
    assert torch.equal(faces.unique(), torch.arange(len(vertices), dtype=torch.int32, device=faces.device))
    following = {(int(a), int(b)): int(c) for f in faces for a, b, c in (f, f.roll(-1), f.roll(-2))}
    degree = torch.bincount(directed[:, 0], minlength=len(vertices)).tolist()
    for (a, start), step in following.items():
        count = 1
        while step != start:
            step, count = following[a, step], count + 1
        assert count == degree[a]


@pytest.mark.parametrize("make", [lambda: ops.TetGrid.kuhn(24), lambda: ops.TetGrid.a15(32)], ids=["kuhn", "a15"])
def test_a_ball_is_a_closed_sphere_wound_outwards(make, device):
    grid = make().to(device)
    vertices, faces = ops.marching_tets(grid.positions, 0.61 - grid.positions.norm(dim=-1), grid)
    assert len(faces) == 2 * len(vertices) - 4
    # Chords cut off 1 - O(h^2/r^2): under 3 % at this resolution. The sign says which way the faces look.
    assert 0.97 < signed_volume(vertices, faces) / (4 / 3 * torch.pi * 0.61**3) < 1


def test_any_signs_give_a_closed_oriented_manifold(grid, generator):
    vertices, faces = ops.marching_tets(grid.positions, noise(grid, generator), grid)
    assert_closed_oriented_manifold(vertices, faces)


def test_grids_fill_the_box_and_are_oriented(grid):
    corners = grid.positions[grid.tets.long()].double()
    determinants = torch.linalg.det(corners[:, 1:] - corners[:, :1])
    assert torch.isclose(determinants.abs().sum() / 6, torch.tensor(8.0, dtype=torch.float64, device=grid.device))
    if grid.kind != "tets":
        assert (determinants < 0).all()
    else:
        assert (determinants > 0).all()


def test_a15_has_the_lattice_s_cells():
    grid = ops.TetGrid.a15(32)
    corners = grid.positions[grid.tets.long()].double() * 16  # edges 2, sqrt(5), sqrt(6)
    volumes = torch.linalg.det(corners[:, 1:] - corners[:, :1]).abs() / 6
    inner = (corners.amin((1, 2)) > -12) & (corners.amax((1, 2)) < 12)
    sizes, counts = volumes[inner].mul(6).round().unique(return_counts=True)
    assert sizes.tolist() == [8, 9]  # 4/3 and 3/2: 30 and 16 of each 46
    assert 1.6 < counts[0] / counts[1] < 2.2


def test_edges_are_unique_and_sorted(grid):
    edges, rows = grid.edges.long(), grid.tet_edges.long()
    keys = edges[:, 0] * grid.num_vertices + edges[:, 1]
    assert (edges[:, 0] < edges[:, 1]).all() and (keys.diff() > 0).all()
    pairs = grid.tets[:, [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]].long().sort(-1).values
    assert torch.equal(edges[rows], pairs)
    assert torch.equal(rows.unique(), torch.arange(len(edges), device=grid.device))


def test_crossing_edges_hold_the_vertices(grid, generator):
    sdf = noise(grid, generator)
    vertices, _ = ops.marching_tets(grid.positions, sdf, grid)
    a, b = grid.positions[grid.crossing_edges(sdf).long()].unbind(1)
    off_line = torch.linalg.cross(vertices - a, b - a).norm(dim=-1)
    assert len(a) == len(vertices) and (off_line < 1e-6).all()


def test_a_single_tet_has_kaolin_s_faces(device):
    """Order and winding of each sign pattern, written down from kaolin's table; edges 01, 02, 03, 12, 13, 23."""
    expected = {
        1: [[1, 0, 2]], 2: [[4, 0, 3]], 3: [[1, 4, 2], [1, 3, 4]], 4: [[3, 1, 5]], 5: [[2, 3, 0], [2, 5, 3]],
        6: [[1, 4, 0], [1, 5, 4]], 7: [[4, 2, 5]], 8: [[4, 5, 2]], 9: [[4, 1, 0], [4, 5, 1]],
        10: [[3, 2, 0], [3, 5, 2]], 11: [[1, 3, 5]], 12: [[4, 1, 2], [4, 3, 1]], 13: [[3, 0, 4]], 14: [[2, 0, 1]],
    }  # fmt: skip
    positions = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]], device=device)
    grid = ops.TetGrid.from_tets(positions, torch.tensor([[0, 1, 2, 3]], device=device))
    edges = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for case in range(16):
        sdf = torch.tensor([1.0 if case >> i & 1 else -3.0 for i in range(4)], device=device)
        vertices, faces = ops.marching_tets(positions, sdf, grid)
        crossing = [e for e, (a, b) in enumerate(edges) if (sdf[a] > 0) != (sdf[b] > 0)]
        assert len(vertices) == len(crossing)
        assert [[crossing[v] for v in face] for face in faces.tolist()] == expected.get(case, [])


def test_reference_gradcheck(grid, generator):
    if grid.num_vertices > 200:
        pytest.skip("finite differences take too long")
    positions = grid.positions.double() + 0.01 * torch.randn(grid.positions.shape, generator=generator)
    sdf = noise(grid, generator, torch.float64)
    sdf = torch.where(sdf.abs() < 0.05, 0.05 * sdf.sign(), sdf)  # keep away from sign changes
    positions.requires_grad_(), sdf.requires_grad_()
    torch.autograd.gradcheck(lambda p, s: reference_marching_tets(p, s, grid.tets)[0], (positions, sdf))


@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
def test_no_surface_gives_empty_outputs_and_zero_gradients(sign, grid):
    positions = grid.positions.clone().requires_grad_()
    sdf = torch.full((grid.num_vertices,), sign, device=grid.device, requires_grad=True)
    vertices, faces = ops.marching_tets(positions, sdf, grid)
    assert vertices.shape == (0, 3) and faces.shape == (0, 3) and faces.dtype == torch.int32
    grad_positions, grad_sdf = torch.autograd.grad(vertices.sum(), (positions, sdf))
    assert grad_positions.shape == positions.shape and not grad_positions.any()
    assert grad_sdf.shape == sdf.shape and not grad_sdf.any()


def test_errors_name_the_argument():
    grid = ops.TetGrid.kuhn(3)
    sdf = torch.ones(64)
    with pytest.raises(ValueError, match=r"positions: expected shape \[64, 3\], got \[63, 3\]"):
        ops.marching_tets(grid.positions[1:], sdf, grid)
    with pytest.raises(ValueError, match=r"sdf: expected shape \[64\]"):
        ops.marching_tets(grid.positions, sdf[:, None], grid)
    with pytest.raises(TypeError, match="sdf"):
        ops.marching_tets(grid.positions, sdf.long(), grid)
    for bad in (float("nan"), float("inf"), -float("inf")):
        sdf[5] = bad
        with pytest.raises(ValueError, match="sdf: expected finite values"):
            ops.marching_tets(grid.positions, sdf, grid)
    with pytest.raises(ValueError, match="resolution"):
        ops.TetGrid.kuhn(0)
    with pytest.raises(ValueError, match="resolution"):
        ops.TetGrid.kuhn(600)
    with pytest.raises(ValueError, match="resolution"):
        ops.TetGrid.a15(6)
    with pytest.raises(ValueError, match=r"tets: expected indices in \[0, 64\), got 0 to 64"):
        ops.TetGrid.from_tets(grid.positions, torch.tensor([[0, 1, 2, 64]]))
