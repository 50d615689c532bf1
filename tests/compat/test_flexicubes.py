"""FlexiCubes in the kaolin drop-in: its tables, closed surfaces, weights, tetrahedra, gradients, errors.

Against kaolin's own code (tests/clients) faces are equal and values within rounding, random fields included.
"""

import math

import pytest
import torch

from text3d_fast.compat.kaolin.ops.conversions import FlexiCubes
from text3d_fast.compat.kaolin.ops.conversions import _dual_cases as cases


def ball(size, dtype=torch.float32, noise=0.0):
    cubes = FlexiCubes("cpu")
    corners, index = cubes.construct_voxel_grid(size)
    corners = corners.to(dtype)
    generator = torch.Generator().manual_seed(0)
    jitter = noise * torch.randn(len(corners), generator=generator, dtype=dtype)
    return cubes, corners, corners.norm(dim=1) - 0.35 + jitter, index


def volume(corners, faces):
    a, b, c = corners[faces].unbind(1)
    return float((a * b.cross(c, dim=1)).sum() / 6)


def assert_closed(faces):
    """Every edge in one direction once, and once in the other."""
    edges = torch.cat((faces[:, :2], faces[:, 1:], faces[:, ::2].flip(1)))
    there, back = edges.unique(dim=0, return_counts=True), edges.flip(1).unique(dim=0, return_counts=True)
    assert torch.equal(there[0], back[0]) and torch.equal(there[1], back[1])
    return int(there[1].max())


def test_loops_share_out_the_crossed_edges():
    for case, rows in enumerate(cases.loops()):
        crossed = [e for e, (a, b) in enumerate(cases.EDGES) if (case >> a ^ case >> b) & 1]
        assert sorted(e for row in rows for e in row if e >= 0) == crossed
        assert all(sum(e >= 0 for e in row) in (0, 3, 4, 5, 6, 7) for row in rows)
    assert sum(row[3] > 0 for row in cases.flips()) == 36  # C16 and C19 in all orientations
    assert cases.loops()[6][:2] == [[0, 1, 9] + [-1] * 4, [4, 7, 8] + [-1] * 4]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [9, (8, 11, 9)])
def test_a_ball(size, training):
    cubes, corners, field, index = ball(size)
    points, faces, deviation = cubes(corners, field, index, size, training=training)
    assert assert_closed(faces) == 1 and len(faces) == 2 * len(points) - 4
    assert volume(points, faces) == pytest.approx(4 / 3 * math.pi * 0.35**3, rel=0.15)  # outwards; averages lie inside
    assert (points.norm(dim=1) - 0.35).abs().max() < 0.02 and deviation.min() >= 0
    assert len(deviation) == 4 * (len(faces) // (4 if training else 2))


def test_rough_fields_make_closed_surfaces_away_from_the_border():
    cubes, corners, field, index = ball(12, noise=0.2)
    field = torch.where(corners.abs().amax(1) > 0.49, field.abs() + 0.1, field)
    points, faces, _ = cubes(corners, field, index, 12)
    assert assert_closed(faces) == 1  # two faces an edge: the flips of C16 and C19 see to it


def test_tetrahedra_fill_the_surface():
    cubes, corners, field, index = ball(10)
    points, faces, _ = cubes(corners, field, index, 10)
    for training in (False, True):
        vertices, tets, _ = cubes(corners, field, index, 10, output_tetmesh=True, training=training)
        a, b, c, d = vertices[tets].unbind(1)
        size = ((b - a).cross(c - a, dim=1) * (d - a)).sum(1).abs().sum() / 6
        assert float(size) == pytest.approx(volume(points, faces), rel=0.03)
        assert max((x - y).norm(dim=1).max() for x in (a, b) for y in (c, d)) < 0.3


def test_weights_and_features():
    cubes, corners, field, index = ball(6)
    plain = cubes(corners, field, index, 6)
    zero = [torch.zeros(len(index), n) for n in (12, 8)]
    same = cubes(corners, field, index, 6, beta=zero[0], alpha=zero[1], gamma_f=torch.zeros(len(index)))
    torch.testing.assert_close(same[0], plain[0])
    generator = torch.Generator().manual_seed(1)
    moved = cubes(corners, field, index, 6, alpha=torch.randn(len(index), 8, generator=generator),
                  beta=torch.randn(len(index), 12, generator=generator))
    assert torch.equal(moved[1], plain[1]) and 1e-3 < (moved[0] - plain[0]).abs().max() < 1 / 6
    for training in (False, True):
        points, _, _, features = cubes(corners, field, index, 6, voxelgrid_features=corners * 2 + 1, training=training)
        torch.testing.assert_close(features, points * 2 + 1)  # linear ones go where the points go


def test_planes_of_a_known_gradient():
    """A box's corners come out sharp."""
    cubes, corners, _, index = ball(5)
    half = torch.tensor([0.31, 0.22, 0.27])

    def box(x):
        return (x.abs() - half).amax(1)

    def gradient(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(box(x).sum(), x)[0]

    sharp = cubes(corners, box(corners), index, 5, grad_func=gradient)[0]
    blunt = cubes(corners, box(corners), index, 5)[0]
    missed = [float((points.abs() - half).norm(dim=1).min()) for points in (sharp, blunt)]
    assert missed[0] < 0.015 and missed[1] > 2 * missed[0]  # the crossings that the planes go through are off by 0.01


def test_gradients():
    cubes, corners, field, index = ball(3, torch.float64, noise=0.02)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(len(index), *n, generator=generator, dtype=torch.float64, requires_grad=True)
               for n in ((12,), (8,), ())]

    def run(corners, field, beta, alpha, gamma):
        points, _, deviation = cubes(corners, field, index, 3, beta=beta, alpha=alpha, gamma_f=gamma, training=True)
        return points, deviation.sum()

    inputs = corners.requires_grad_(), field.detach().requires_grad_(), *weights
    torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_nothing_inside_and_errors():
    cubes, corners, field, index = ball(3)
    points, faces, deviation = cubes(corners, field.abs() + 1, index, 3)
    assert points.shape == (0, 3) and faces.shape == (0, 3) and deviation.shape == (0,)
    with pytest.raises(ValueError, match=r"scalar_field: expected shape \[64\], got \[63\]"):
        cubes(corners, field[1:], index, 3)
    with pytest.raises(ValueError, match=r"beta: expected shape \[27, 12\], got \[27, 8\]"):
        cubes(corners, field, index, 3, beta=torch.zeros(27, 8))
    with pytest.raises(ValueError, match="resolution: expected that of 27 cubes, got 4"):
        cubes(corners, field, index, 4)
    with pytest.raises(ValueError, match="voxelgrid_features: expected None"):
        cubes(corners, field, index, 3, output_tetmesh=True, voxelgrid_features=corners)
