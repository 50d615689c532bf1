"""The Triton twins against the references at tiny odd sizes: in the interpreter (TRITON_INTERPRET=1), or on a GPU.

The interpreter takes a second for what a GPU does in a microsecond, so each case is as small as its corner cases allow.
"""

import pytest
import torch

from text3d_fast import nn, ops, use_backend
from text3d_fast.ops.tet_grid import TetGrid

pytestmark = pytest.mark.usefixtures("runs_triton")


@pytest.fixture
def soup(device, generator):
    """pos [2, 9, 4], tri [8, 3]: triangles before, behind and across the camera, some of whose vertices are shared."""
    pos = torch.randn(2, 9, 4, generator=generator, device=device)
    pos[:, 3:, 3] = pos[:, 3:, 3].abs() + 1
    tri = torch.randint(0, 9, (8, 3), generator=generator, device=device, dtype=torch.int32)
    return pos, tri


def compare(run, leaves, tolerance=1e-4, wide=torch.float64):
    """run(*leaves) -> outputs, all differentiable: values and gradients by Triton and by the reference in `wide`."""
    results, cotangents = [], None
    for backend, dtype in (("triton", torch.float32), ("reference", wide)):
        with use_backend(backend):
            own = [x.detach().to(dtype).requires_grad_() for x in leaves]
            outputs = [o for o in run(*own) if o.numel()]
            cotangents = cotangents or [torch.randn_like(o) for o in outputs]
            loss = sum((o * c.to(dtype)).sum() for o, c in zip(outputs, cotangents))
            grads = torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True)
            results.append([*outputs, *grads])
    for got, expected in zip(*results):  # sums of at most a hundred fp32 terms
        largest = float(expected.detach().abs().max())
        torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance * max(1.0, largest))
    return results[0]


def rasterized(soup, size):
    with use_backend("reference"):
        return ops.rasterize(*soup, size)


def test_every_op_has_a_twin():
    """`pip install` without nvcc serves every op on a GPU."""
    from text3d_fast import backends

    without = {row["op"] for row in backends.table() if "no Triton kernel" in row["why not others"]}
    assert not without, without


@pytest.mark.parametrize("ranges", [None, [[1, 4], [0, 0], [5, 3]]])
def test_rasterize(ranges, soup, device, poisoned_empty):
    pos, tri = soup
    if ranges is not None:
        pos, ranges = pos[0], torch.tensor(ranges, dtype=torch.int32)
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            results.append(ops.rasterize(pos, tri, (7, 19), ranges))
    (got, got_db), (expected, expected_db) = results
    assert (expected[..., 3] > 0).any()
    assert torch.equal(got[..., 3].view(torch.int32), expected[..., 3].view(torch.int32))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_db, expected_db, rtol=1e-3, atol=1e-4)


def test_rasterize_small_triangles_and_peeling(device, generator, poisoned_empty):
    centre = torch.rand(40, 1, 2, generator=generator, device=device) * 2 - 1
    xy = (centre + 0.2 * torch.randn(40, 3, 2, generator=generator, device=device)).reshape(1, 120, 2)
    z = torch.rand(1, 120, 1, generator=generator, device=device)
    pos = torch.cat([xy, z, torch.ones_like(z)], -1)
    tri = torch.arange(120, dtype=torch.int32, device=device).view(40, 3)
    layers = []
    for backend in ("triton", "reference"):
        with use_backend(backend), ops.DepthPeeler(pos, tri, (17, 11)) as peeler:
            layers.append([peeler.rasterize_next_layer()[0][..., 3] for _ in range(2)])
    for got, expected in zip(*layers):
        assert (expected > 0).any() and torch.equal(got, expected)


@pytest.mark.parametrize("grad_db", [True, False])
def test_rasterize_gradient(grad_db, soup):
    pos, tri = soup
    pos = pos.clone()
    pos[..., 3] = pos[..., 3].abs() + 1  # far from the poles of the formulae

    def run(pos):
        rast, rast_db = ops.rasterize(pos, tri, (5, 9), grad_db=grad_db)
        return [rast[..., :2], rast_db] if grad_db else [rast[..., :2]]

    compare(run, [pos], 1e-3)


@pytest.mark.parametrize("case", [((2, 9, 3), "all"), ((1, 9, 5), [4, 0, 4]), ((9, 1), None)])
def test_interpolate(case, soup, device, generator, poisoned_empty):
    shape, diff_attrs = case
    rast, rast_db = rasterized(soup, (5, 13))
    attr = torch.randn(shape, generator=generator, device=device)
    rast[0, 0, 0, 3] = 999  # a triangle that does not exist is background
    known = rast.clone()
    known[0, 0, 0] = 0

    def run(attr, uv, db):
        from text3d_fast import backends

        reference = backends.choose("interpolate", attr.device) == "reference"
        image = torch.cat([uv, (known if reference else rast)[..., 2:].to(uv.dtype)], -1)
        return ops.interpolate(attr, image, soup[1], db, diff_attrs)

    compare(run, [attr, known[..., :2], rast_db])


@pytest.mark.parametrize("shared", [False, True])
def test_antialias(shared, soup, device, generator, poisoned_empty):
    pos, tri = soup
    pos = pos[:1] if shared else pos
    rast, _ = rasterized((pos.expand(2, -1, -1).contiguous(), tri), (7, 13))
    color = torch.rand(2, 7, 13, 3, generator=generator, device=device)
    out, *_ = compare(lambda c, p: [ops.antialias(c, rast.to(c.dtype), p, tri, pos_gradient_boost=2.0)], [color, pos])
    assert (out != color).any()


TEXTURES = [("nearest", "wrap"), ("linear", "zero"), ("linear", "cube"), ("linear-mipmap-nearest", "clamp"),
            ("linear-mipmap-linear", "wrap"), ("linear-mipmap-linear", "cube")]


@pytest.mark.parametrize("filter_mode, boundary", TEXTURES)
def test_texture(filter_mode, boundary, device, generator, poisoned_empty):
    cube = boundary == "cube"
    axes = 3 if cube else 2
    tex = torch.rand(2, *((6, 4, 4) if cube else (4, 8)), 3, generator=generator, device=device)
    uv = torch.rand(2, 3, 5, axes, generator=generator, device=device) * 2.6 - 1.3
    leaves = [tex, uv]
    if "mipmap" in filter_mode:
        leaves.append(0.3 * torch.randn(2, 3, 5, 2 * axes, generator=generator, device=device))
        leaves.append(torch.rand(2, 3, 5, generator=generator, device=device))

    def run(tex, uv, da=None, bias=None):
        return [ops.texture(tex, uv, da, bias, filter_mode=filter_mode, boundary_mode=boundary)]

    compare(run, leaves, 1e-3)


@pytest.mark.parametrize("cone_angle", [0.0, 0.05])
@pytest.mark.parametrize("capacity", [None, 23, 4000])
def test_march_rays(cone_angle, capacity, device, generator, poisoned_empty):
    grid = nn.OccupancyGrid([-1.0, -1, -1, 1, 1.5, 1], resolution=(5, 3, 4), levels=2).to(device)
    grid.binaries.copy_(torch.rand(grid.binaries.shape, generator=generator, device=device) < 0.4)
    origins = torch.randn(7, 3, generator=generator, device=device) * 0.8
    directions = torch.nn.functional.normalize(-origins + 0.3, dim=-1)
    directions[3] = torch.tensor([0.0, 0, 1])
    directions[4] = 0
    jitter = torch.rand(7, generator=generator, device=device)
    far = torch.linspace(0.5, 9, 7, device=device)
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            results.append(ops.march_rays(origins, directions, grid, 0.1, far, 0.13, jitter, cone_angle, capacity))
    got, expected = results
    assert torch.equal(got.ray_offsets, expected.ray_offsets) and torch.equal(got.ray_ids, expected.ray_ids)
    torch.testing.assert_close(got.t_starts, expected.t_starts, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.t_ends, expected.t_ends, rtol=1e-6, atol=1e-6)
    assert expected.num_samples > 20 and (capacity is None or bool(got.overflow) == bool(expected.overflow))


def test_march_rays_tells_of_wrong_rays(device):
    grid = nn.OccupancyGrid([-1.0, -1, -1, 1, 1, 1], resolution=2).to(device)
    origins = torch.full((3, 3), float("nan"), device=device)
    with use_backend("triton"):
        if device.type == "cpu":
            with pytest.raises(ValueError, match="finite"):
                ops.march_rays(origins, torch.ones_like(origins), grid)
        assert ops.march_rays(origins[:0], origins[:0], grid, capacity=5).ray_offsets.tolist() == [0]


@pytest.mark.parametrize("kind", ["kuhn", "tets"])
@pytest.mark.parametrize("zeros", [False, True])
def test_marching_tets(kind, zeros, device, generator, poisoned_empty):
    grid = TetGrid.kuhn((1, 1, 65), device=device) if kind == "kuhn" else TetGrid.a15(4, device=device)
    positions = grid.positions
    sdf = torch.randn(grid.num_vertices, generator=generator, device=device)
    if kind == "kuhn":
        sdf[positions[:, 2].abs() < 0.9] = -1  # most words hold no surface
    if zeros:
        sdf[::5] = 0
    sdf = torch.where(sdf.abs() < 0.05, sdf.sign() * 0.05, sdf)  # gradients grow as 1 / (s0 - s1)
    faces = []

    def run(positions, sdf):
        vertices, own = ops.marching_tets(positions, sdf, grid)
        faces.append(own)
        return [vertices]

    compare(run, [positions, sdf])
    assert len(faces[0]) and torch.equal(faces[0], faces[1].int())


def test_empty_inputs(device):
    with use_backend("triton"):
        pos, tri = torch.zeros(1, 3, 4, device=device), torch.zeros(0, 3, dtype=torch.int32, device=device)
        rast, _ = ops.rasterize(pos, tri, (2, 3))
        assert rast.eq(0).all() and ops.rasterize(pos, tri, (0, 3))[0].shape == (1, 0, 3, 4)
        assert ops.interpolate(torch.ones(1, 3, 2, device=device), rast, tri)[0].eq(0).all()
        assert ops.texture(torch.ones(1, 2, 2, 0, device=device), torch.zeros(1, 2, 2, 2, device=device)).shape[-1] == 0
        grid = TetGrid.kuhn(2, device=device)
        vertices, faces = ops.marching_tets(grid.positions, -torch.ones(grid.num_vertices, device=device), grid)
        assert vertices.shape == (0, 3) and faces.shape == (0, 3)
