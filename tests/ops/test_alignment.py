"""Views that begin anywhere in their storage: the same results, and when emulated no vector load off its boundary."""

import pytest
import torch
from meshes import soup

from text3d_fast import native, nn, ops


def shifted(x, by=1):
    """The same numbers, `by` elements behind the start of their storage."""
    storage = x.new_empty(x.numel() + by)
    view = storage[by:].view(x.shape)
    view.copy_(x.detach())
    assert view.data_ptr() % native.ALIGNMENT
    return view.requires_grad_(x.requires_grad)


def results(function, tensors, wanted, generator):
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    cotangents = [shifted(torch.randn(o.shape, generator=generator, device=o.device)) for o in outputs]
    return *outputs, *torch.autograd.grad(outputs, [tensors[i] for i in wanted], cotangents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("features", [1, 2, 4])
def test_hash_grid(features, dtype, device, generator):
    spec = ops.HashGridSpec(dim=3, levels=4, features=features, log2_table_size=8, base_resolution=4)
    x = torch.rand(65, 3, generator=generator, device=device)
    params = torch.randn(spec.num_params, generator=generator, device=device)

    def run(x, params):
        return ops.hash_grid(x, params, spec, compute_dtype=dtype).float()

    expected, got = (results(run, [make(x.requires_grad_()), make(params.requires_grad_())], (0, 1),
                             torch.Generator(device).manual_seed(1)) for make in (torch.clone, shifted))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_raster_family(device, generator):
    pos, tri = soup(20, 0.5, generator, device)
    tex = torch.rand(1, 8, 8, 3, generator=generator, device=device)

    def run(pos, tri, tex):
        rast, rast_db = (shifted(x) for x in ops.rasterize(pos, tri, (9, 11)))
        uv, uv_da = ops.interpolate(pos[..., :2], rast, tri, rast_db, "all")
        return ops.antialias(ops.texture(tex, uv, uv_da), rast, pos, tri)

    values = pos.requires_grad_(), tri, tex.requires_grad_()
    expected, got = (results(run, [make(x) for x in values], (0, 2), torch.Generator(device).manual_seed(1))
                     for make in (lambda x: x.detach().clone().requires_grad_(x.requires_grad), shifted))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_march_and_composite(device, generator):
    grid = nn.OccupancyGrid((-1, -1, -1, 1, 1, 1), 8).to(device)
    origins = torch.rand(7, 3, generator=generator, device=device) - 0.5
    directions = torch.nn.functional.normalize(torch.randn(7, 3, generator=generator, device=device), dim=-1)
    samples = ops.march_rays(origins, directions, grid, step=0.1)
    moved = ops.march_rays(shifted(origins), shifted(directions), grid, step=0.1)
    assert torch.equal(moved.t_starts, samples.t_starts)
    sigma = torch.rand(samples.num_samples, generator=generator, device=device).requires_grad_()
    values = torch.rand(samples.num_samples, 3, generator=generator, device=device).requires_grad_()
    odd = ops.RaySamples(*(shifted(getattr(samples, n)) for n in ("ray_ids", "t_starts", "t_ends", "ray_offsets")))
    expected, got = (results(lambda s, v, among=among: ops.composite(s, v, among), [make(sigma), make(values)], (0, 1),
                             torch.Generator(device).manual_seed(1))
                     for make, among in ((torch.clone, samples), (shifted, odd)))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_marching_tets(device, generator):
    for grid in (ops.TetGrid.kuhn(4, device=device), ops.TetGrid.from_tets(*tetrahedra(device))):
        positions = grid.positions.clone()
        sdf = torch.randn(len(positions), generator=generator, device=device)
        expected, got = (ops.marching_tets(make(positions), make(sdf), grid) for make in (torch.clone, shifted))
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


def tetrahedra(device):
    tets = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]], dtype=torch.int32, device=device)
    corners = [[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]
    return torch.tensor(corners, device=device), shifted(tets)
