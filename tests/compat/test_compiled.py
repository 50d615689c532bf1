"""What a client's training step calls, under torch.compile without a graph break, torch.export and autocast."""

import pytest
import torch

from text3d_fast.compat import tinycudann as tcnn
from text3d_fast.compat.kaolin.ops.conversions import marching_tetrahedra
from text3d_fast.compat.nvdiffrast import torch as dr
from text3d_fast.ops import TetGrid

GRID = {"otype": "HashGrid", "n_levels": 3, "log2_hashmap_size": 8, "base_resolution": 4, "per_level_scale": 1.5}
NETWORK = {"otype": "FullyFusedMLP", "activation": "ReLU", "output_activation": "None", "n_neurons": 16,
           "n_hidden_layers": 1}


class Picture(torch.nn.Module):
    """A textured and antialiased triangle, as nvdiffrec and threestudio draw meshes."""

    def __init__(self, device):
        super().__init__()
        self.context = dr.RasterizeCudaContext(device)
        self.tri = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32, device=device)
        self.topology = dr.antialias_construct_topology_hash(self.tri)  # as many edges as there are: not while tracing
        self.uv = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]], device=device)

    def forward(self, pos, tex):
        rast, rast_db = dr.rasterize(self.context, pos, self.tri, [12, 10])
        uv, uv_da = dr.interpolate(self.uv, rast, self.tri, rast_db, diff_attrs="all")
        color = dr.texture(tex, uv, uv_da, max_mip_level=2)
        return dr.antialias(torch.where(rast[..., 3:] > 0, color, 0.0), rast, pos, self.tri, self.topology)


def picture(device):
    generator = torch.Generator(device).manual_seed(0)
    pos = torch.tensor([[[-0.8, -0.7, 0.1, 1.0], [0.9, -0.5, 0.2, 1.1], [0.6, 0.8, 0.3, 0.9], [-0.7, 0.6, 0.4, 1.0]]],
                       device=device)
    return Picture(device), [pos, torch.rand(1, 8, 8, 3, generator=generator, device=device)]


def encoding(device):
    return tcnn.Encoding(3, GRID).to(device), [torch.rand(9, 3, device=device)]


def network(device):
    return tcnn.Network(3, 2, NETWORK).to(device), [torch.rand(9, 3, device=device)]


def both(device):
    return tcnn.NetworkWithInputEncoding(3, 2, GRID, NETWORK).to(device), [torch.rand(9, 3, device=device)]


@pytest.fixture(params=[picture, encoding, network, both], ids=lambda case: case.__name__)
def case(request, device):
    torch.manual_seed(0)
    module, inputs = request.param(device)
    for parameter in module.parameters():  # a grid's initial values are too small to see
        parameter.data.mul_(1e3 if request.param is encoding else 1.0)
    return module, inputs


def test_compiled_whole(case):
    module, inputs = case
    leaves = [x.requires_grad_() for x in inputs] + list(module.parameters())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for run in (module, compiled):
        out = run(*inputs)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert results[0][1].ne(0).any()
    for a, b in zip(*results):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_exported(case):
    module, inputs = case
    program = torch.export.export(module, tuple(inputs), strict=False)
    assert "torch.ops.text3d." in str(program)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*inputs), module(*inputs))


def test_autocast_changes_nothing(case, device):
    module, inputs = case
    with torch.no_grad():
        expected = module(*inputs)
        with torch.autocast(device.type, torch.bfloat16):
            got = module(*inputs)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


def test_halves_become_float32_where_the_original_knows_no_other(device):
    """Under autocast a network's half output may reach the rasterizer's ops; outside it is refused by name."""
    module, (pos, tex) = picture(device)
    with torch.autocast(device.type, torch.bfloat16):
        assert module(pos, tex.bfloat16()).dtype == torch.float32
    with pytest.raises(TypeError, match="tex: expected torch.float32, got torch.bfloat16"):
        module(pos, tex.bfloat16())


def test_marching_tetrahedra(device):
    """Under autocast. It looks up the grid of `tets`, so only the op below it is compiled and exported whole."""
    grid = TetGrid.kuhn(3, device)
    sdf = 0.7 - grid.positions.norm(dim=-1)
    expected = marching_tetrahedra(grid.positions[None], grid.tets.long(), sdf[None])
    with torch.autocast(device.type, torch.bfloat16):
        for a, b in zip(marching_tetrahedra(grid.positions[None], grid.tets.long(), sdf[None]), expected):
            torch.testing.assert_close(a, b)
