"""ops.marching_tets against its reference: order, values, gradients; topology and orientation; compile; errors."""

import os
import subprocess
import sys

import pytest
import torch

from text3d_fast import ops, use_backend
from text3d_fast.reference.marching_tets import marching_tets as reference_marching_tets


def positive_tets() -> ops.TetGrid:
    a15 = ops.TetGrid.a15(8)
    return ops.TetGrid.from_tets(a15.positions, a15.tets[:, [1, 0, 2, 3]].long())


GRIDS = {
    "kuhn 1": lambda: ops.TetGrid.kuhn(1),
    "kuhn 2x3x5": lambda: ops.TetGrid.kuhn((2, 3, 5)),
    "kuhn 9": lambda: ops.TetGrid.kuhn(9),
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


@pytest.mark.parametrize("zeros", [False, True])
def test_matches_reference(zeros, grid, generator, poisoned_empty):
    """Same vertices, same faces, same order; gradients to deformed positions and to the sdf."""
    positions = grid.positions + 0.02 * torch.randn(grid.positions.shape, generator=generator, device=grid.device)
    sdf = torch.randn(grid.num_vertices, generator=generator, device=grid.device)
    if zeros:
        sdf = torch.where(sdf.abs() < 0.3, torch.zeros_like(sdf), sdf)
    leaves = [positions.requires_grad_(), sdf.requires_grad_()]
    vertices, faces = ops.marching_tets(*leaves, grid)
    cotangent = torch.randn(vertices.shape, generator=generator, device=grid.device)
    gradients = torch.autograd.grad(vertices, leaves, cotangent)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    expected, expected_faces = reference_marching_tets(*doubles, grid.tets)
    expected_gradients = torch.autograd.grad(expected, doubles, cotangent.double())
    assert faces.dtype == torch.int32 and torch.equal(faces, expected_faces)
    # t in [0, 1] rounds to 2^-24 relative, positions are of order 1
    torch.testing.assert_close(vertices, expected.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients[0], expected_gradients[0].float(), rtol=1e-5, atol=1e-5)
    # 1 / (s0 - s1) reaches 1e5 in noise, and t, cotangent and differences each round: compare with the largest term
    scale = expected_gradients[1].abs().clamp(min=1)
    assert ((gradients[1] - expected_gradients[1]).abs() / scale).max() < 1e-3


def test_gradient_to_sdf_alone(grid, generator):
    sdf = noise(grid, generator).requires_grad_()
    positions = grid.positions.clone().requires_grad_()
    both = torch.autograd.grad(ops.marching_tets(positions, sdf, grid)[0].sum(), (positions, sdf))
    (alone,) = torch.autograd.grad(ops.marching_tets(grid.positions, sdf, grid)[0].sum(), sdf)
    assert torch.equal(alone, both[1])


def test_is_the_same_with_any_number_of_threads(generator):
    grid = ops.TetGrid.kuhn(31)
    leaves = [grid.positions.clone().requires_grad_(), noise(grid, torch.Generator().manual_seed(0)).requires_grad_()]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            vertices, faces = ops.marching_tets(*leaves, grid)
            results.append((vertices, faces, *torch.autograd.grad(vertices.square().sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def op_arguments(grid, sdf, positions):
    if grid.kind == "kuhn":
        return torch.ops.text3d.marching_tets_kuhn.default, (positions, sdf, *grid.resolution, "native")
    connectivity = (grid.num_vertices, grid.tets, grid.edges, grid.tet_edges, *grid.incidence)
    return torch.ops.text3d.marching_tets.default, (positions, sdf, *connectivity, "native")


@pytest.mark.parametrize("make", [lambda: ops.TetGrid.kuhn((2, 3, 5)), lambda: ops.TetGrid.a15(4)], ids=["kuhn", "a15"])
def test_opcheck(make, device, generator):
    grid = make().to(device)
    sdf = noise(grid, generator)
    op, arguments = op_arguments(grid, sdf.requires_grad_(), grid.positions.clone().requires_grad_())
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("make", [lambda: ops.TetGrid.kuhn(5), lambda: ops.TetGrid.a15(8)], ids=["kuhn", "a15"])
def test_compiles_whole(make, device, generator):
    grid = make().to(device)
    sdf = noise(grid, generator).requires_grad_()
    _ = grid.incidence if grid.kind != "kuhn" else None  # connectivity is made ahead, outside of the graph

    def loss(sdf):
        vertices, faces = ops.marching_tets(grid.positions, 2 * sdf, grid)
        return vertices.square().sum() + 0 * faces.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(sdf), loss(sdf))
    torch.testing.assert_close(torch.autograd.grad(compiled(sdf), sdf), torch.autograd.grad(loss(sdf), sdf))


def test_no_tets(device):
    grid = ops.TetGrid.from_tets(torch.zeros(0, 3, device=device), torch.zeros(0, 4, dtype=torch.int32, device=device))
    sdf = torch.zeros(0, device=device, requires_grad=True)
    vertices, faces = ops.marching_tets(grid.positions, sdf, grid)
    assert vertices.shape == (0, 3) and faces.shape == (0, 3)
    assert torch.autograd.grad(vertices.sum(), sdf)[0].shape == (0,)


def test_non_contiguous_inputs(grid, generator):
    sdf = noise(grid, generator)
    expected = ops.marching_tets(grid.positions, sdf, grid)
    positions = grid.positions.T.contiguous().T
    got = ops.marching_tets(positions, torch.stack([sdf, sdf], 1)[:, 0], grid)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


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
    shift = torch.randn(grid.positions.shape, generator=generator, device=grid.device)
    positions = grid.positions.double() + 0.01 * shift
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
    with pytest.raises(TypeError, match=r"sdf: expected torch.float32, got torch.float64"):
        ops.marching_tets(grid.positions, sdf.double(), grid)
    with pytest.raises(ValueError, match="resolution"):
        ops.TetGrid.kuhn(0)
    with pytest.raises(ValueError, match="resolution"):
        ops.TetGrid.kuhn(600)
    with pytest.raises(ValueError, match="resolution"):
        ops.TetGrid.a15(6)
    with pytest.raises(ValueError, match=r"tets: expected indices in \[0, 64\), got 0 to 64"):
        ops.TetGrid.from_tets(grid.positions, torch.tensor([[0, 1, 2, 64]]))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_raise(bad, backend, grid):
    for place in (0, grid.num_vertices // 2, grid.num_vertices - 1):
        sdf = torch.ones(grid.num_vertices)
        sdf[place] = bad
        with use_backend(backend), pytest.raises(ValueError, match="sdf: expected finite values"):
            ops.marching_tets(grid.positions.cpu(), sdf, grid.to("cpu"))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees(isa, tmp_path):
    """Run-time dispatch is decided at import, so each in its own process; a machine without one runs the next less."""
    script = (
        "import torch; from text3d_fast import ops; g = ops.TetGrid.kuhn((5, 6, 77));"
        "s = torch.randn(g.num_vertices, generator=torch.Generator().manual_seed(0)).requires_grad_();"
        "p = g.positions.clone().requires_grad_(); v, f = ops.marching_tets(p, s, g);"
        "d = torch.autograd.grad(v.sum(), (p, s));"
        "from text3d_fast.reference.marching_tets import marching_tets as r; w, h = r(p, s, g.tets);"
        "assert torch.equal(f, h); torch.testing.assert_close(v, w, rtol=0, atol=1e-6)"
    )
    environment = {**os.environ, "TEXT3D_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_a_grid_on_meta_says_what_it_cannot_find():
    made = ops.TetGrid.kuhn(4)
    assert made.edges.shape == made.to("meta").edges.shape  # known by then
    assert ops.TetGrid.kuhn(4, device="meta").tets.shape == made.tets.shape
    given = ops.TetGrid.from_tets(torch.rand(5, 3, device="meta"), torch.zeros(2, 4, dtype=torch.int32, device="meta"))
    for grid in (given, ops.TetGrid.kuhn(4, device="meta")):
        for name in ("edges", "incidence"):
            with pytest.raises(ValueError, match="tets: expected values to find"):
                getattr(grid, name)
