"""ops.hash_grid and hash_grid_grad: known values, gradients of first and second order, dialects, errors."""

import pytest
import torch

from text3d_fast import nn, ops
from text3d_fast.ops import HashGridSpec
from text3d_fast.reference import hash_grid as reference

SMALL = [
    HashGridSpec(dim=3, levels=3, features=2, log2_table_size=7, base_resolution=3, per_level_scale=1.7),
    HashGridSpec(dim=2, levels=2, features=4, log2_table_size=5, base_resolution=4, interpolation="smoothstep"),
    HashGridSpec(dim=3, levels=2, features=1, log2_table_size=6, base_resolution=3, dialect="ngp"),
]


def inputs(spec, count, generator, dtype=torch.float32, device="cpu"):
    x = torch.rand(count, spec.dim, generator=generator, dtype=dtype, device=device)
    return x, torch.randn(spec.num_params, generator=generator, dtype=dtype, device=device)


def test_a_dense_grid_interpolates_its_vertices(generator, device):
    spec = HashGridSpec(dim=2, levels=1, features=1, base_resolution=4, kind="dense")  # scale 3, 4 x 4 vertices
    params = torch.arange(16.0, device=device)
    x = torch.tensor([[0.5 / 3, 0.5 / 3], [1 / 3, 0.5 / 3], [0.5, 0.5]], device=device)  # x * 3 + 0.5
    expected = torch.tensor([5.0, 5.5, 10.0], device=device)  # vertex (1, 1), halfway to (2, 1), vertex (2, 2)
    torch.testing.assert_close(ops.hash_grid(x, params, spec)[:, 0], expected)


@pytest.mark.parametrize("spec", SMALL, ids=lambda s: f"{s.dim}d-{s.dialect}-{s.interpolation}")
def test_reference_gradients(spec):
    x, params = inputs(spec, 3, torch.Generator().manual_seed(2), torch.float64)
    x.requires_grad_(), params.requires_grad_()

    def run(x, params):
        return reference.hash_grid(x, params, spec, spec.levels)

    torch.autograd.gradcheck(run, (x, params))
    torch.autograd.gradgradcheck(run, (x, params))


def test_module(device):
    grid = nn.HashGrid(levels=4, features=2, log2_table_size=8, device=device,
                       generator=torch.Generator(device).manual_seed(0))
    assert grid.params.shape == (grid.spec.num_params,) and 9e-5 < grid.params.abs().max() <= 1e-4
    x = torch.rand(5, 7, 3, device=device)
    y = grid(x)
    assert y.shape == (5, 7, 8) == (*x.shape[:-1], grid.output_dim)
    grid.active_levels = 2
    coarse = grid(x)
    assert coarse[..., 4:].eq(0).all() and torch.equal(coarse[..., :4], y[..., :4])
    value, slope = grid.value_and_grad(x)
    assert torch.equal(value, coarse) and slope.shape == (5, 7, 8, 3)
    with pytest.raises(TypeError, match="spec: expected either"):
        nn.HashGrid(HashGridSpec(), levels=3)
