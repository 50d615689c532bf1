"""nn.DeformableTetGrid: a learnable surface that is closed, moves where gradients say, and may vanish."""

import math

import pytest
import torch

from text3d_fast import ops
from text3d_fast.geometry import Mesh
from text3d_fast.nn import DeformableTetGrid


def ball(lattice="a15", resolution=32, radius=0.5, **place):
    grid = DeformableTetGrid(resolution, lattice, **place)
    with torch.no_grad():
        grid.sdf.copy_(radius - grid.rest_positions().norm(dim=-1))
    return grid


@pytest.mark.parametrize("lattice", ["a15", "kuhn"])
def test_a_ball_is_closed_and_has_its_volume(lattice):
    grid = ball(lattice, centre=(0.1, 0.0, -0.1), half_side=0.8)
    mesh = Mesh(*(x.detach() for x in grid.mesh()))
    assert mesh.is_closed() and mesh.euler_characteristic() == 2
    # facets of side 0.1 cut off a few percent of a ball of radius 0.5
    assert mesh.volume() == pytest.approx(4 / 3 * math.pi * 0.125, rel=0.03)
    assert len(grid.crossing_edges()) == len(mesh.vertices)


def test_crossing_edges_of_a_kuhn_grid_are_those_of_its_list():
    grid = ops.TetGrid.kuhn((3, 5, 4))
    sdf = torch.randn(grid.num_vertices, generator=torch.Generator().manual_seed(0))
    low, high = grid.edges.long().unbind(-1)
    expected = grid.edges[(sdf[low] > 0) != (sdf[high] > 0)]
    assert torch.equal(grid.crossing_edges(sdf), expected) and grid.crossing_edges(sdf).dtype == torch.int32
    assert grid.crossing_edges(torch.ones_like(sdf)).shape == (0, 2)


def test_what_touches_the_cube_is_closed_there():
    grid = DeformableTetGrid(16, half_side=0.5)
    with torch.no_grad():
        grid.sdf.fill_(0.1)
    mesh = Mesh(*(x.detach() for x in grid.mesh()))
    assert mesh.is_closed() and mesh.volume() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("lattice", ["a15", "kuhn"])
def test_offsets_stay_within_half_the_shortest_edge(lattice):
    grid = DeformableTetGrid(16, lattice, half_side=0.7)
    with torch.no_grad():
        grid.deformation.normal_(0, 100)
    moved = (grid.positions() - grid.rest_positions()).detach().abs().amax()
    # the box's faces halve the edges that cross them; the shortest edge inside is a whole one
    inner = ~grid.boundary[grid.grid.edges.long()].any(-1)
    low, high = grid.grid.edges[inner].long().unbind(-1)
    rest = grid.rest_positions()
    assert float(grid.spacing) == pytest.approx(float((rest[low] - rest[high]).norm(dim=-1).min()), rel=1e-5)
    assert float(moved) == pytest.approx(float(grid.spacing) / 2, rel=1e-5)


def test_gradients_move_the_surface():
    grid = ball()
    before = grid.mesh()[0].norm(dim=-1).mean().item()
    grid.mesh()[0].norm(dim=-1).mean().backward()
    assert grid.sdf.grad.abs().sum() > 0 and grid.deformation.grad.abs().sum() > 0
    with torch.no_grad():
        grid.sdf -= grid.sdf.grad / grid.sdf.grad.abs().max() * 0.02
    assert grid.mesh()[0].norm(dim=-1).mean().item() < before
    with torch.no_grad():
        grid.sdf.copy_(ball().sdf)
        grid.deformation -= grid.deformation.grad / grid.deformation.grad.abs().max()
    assert grid.mesh()[0].norm(dim=-1).mean().item() < before


def test_a_vanished_surface_is_no_error_and_has_gradients():
    grid = DeformableTetGrid(16)
    with torch.no_grad():
        grid.sdf.fill_(-1)
    vertices, faces = grid.mesh()
    assert vertices.shape == (0, 3) and faces.shape == (0, 3)
    vertices.sum().backward()
    assert not grid.sdf.grad.any()


def test_state_is_restored_with_its_place():
    grid, other = ball(centre=(0.2, 0.0, 0.0), half_side=0.6), DeformableTetGrid(32)
    other.load_state_dict(grid.state_dict())
    torch.testing.assert_close(other.mesh()[0], grid.mesh()[0], rtol=0, atol=0)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="lattice: expected one of a15, kuhn, got 'bcc'"):
        DeformableTetGrid(16, "bcc")
    with pytest.raises(ValueError, match="resolution: expected a positive multiple of 4"):
        DeformableTetGrid(18)
    with pytest.raises(ValueError, match="half_side: expected a positive length"):
        DeformableTetGrid(16, half_side=0.0)
