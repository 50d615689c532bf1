"""The kaolin drop-in: kaolin's documented example, its order and orientation, batches, gradients, errors."""

import pytest
import torch

from text3d_fast.compat.kaolin.ops.conversions import marching_tetrahedra
from text3d_fast.ops import TetGrid
from text3d_fast.reference.marching_tets import marching_tets as reference

TETS = torch.tensor([[0, 1, 3, 5], [4, 5, 0, 6], [0, 3, 2, 6], [5, 3, 6, 7], [0, 5, 3, 6]])


def cube():
    return torch.tensor([[x, y, z] for z in (-1.0, 1) for y in (-1.0, 1) for x in (-1.0, 1)])


def test_the_documented_example():
    vertices = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]])
    found = marching_tetrahedra(vertices, torch.tensor([[0, 1, 2, 3]]), torch.tensor([[-1.0, -1, 0.5, 0.5]]), True)
    expected = torch.tensor([[0, 2 / 3, 0], [0, 0, 2 / 3], [1 / 3, 2 / 3, 0], [1 / 3, 0, 2 / 3]])
    torch.testing.assert_close(found[0][0], expected)
    assert found[1][0].tolist() == [[3, 0, 1], [3, 2, 0]] and found[2][0].tolist() == [0, 0]
    assert found[1][0].dtype == found[2][0].dtype == torch.int64
    assert len(marching_tetrahedra(vertices, torch.tensor([[0, 1, 2, 3]]), torch.tensor([[-1.0, -1, 0.5, 0.5]]))) == 2


def test_batches_of_one_topology():
    sdf = torch.ones(4, 8)
    sdf[1, 4] = -1
    sdf[2, 4:6] = -1
    sdf[3, 4], sdf[3, 5] = -0.5, -0.7
    vertices, faces, tet_idx = marching_tetrahedra(cube().expand(4, -1, -1), TETS, sdf, True)
    assert [len(v) for v in vertices] == [0, 3, 7, 7]
    assert faces[0].shape == (0, 3) and faces[1].tolist() == [[2, 1, 0]]
    assert faces[2].tolist() == faces[3].tolist() == [[2, 1, 3], [6, 3, 5], [3, 1, 5], [5, 0, 4], [5, 1, 0]]
    assert [t.tolist() for t in tet_idx] == [[], [1], [0, 3, 4, 1, 1], [0, 3, 4, 1, 1]]
    torch.testing.assert_close(vertices[3][1], torch.tensor([0.1765, -1.0, 0.1765]), atol=1e-4, rtol=0)
    assert marching_tetrahedra(cube()[None][:0], TETS, sdf[:0], True) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_and_tets_of_faces(dtype):
    grid = TetGrid.kuhn(5)
    tets, generator = grid.tets.long(), torch.Generator().manual_seed(0)
    vertices = (grid.positions + 0.05 * torch.randn(grid.positions.shape, generator=generator)).to(dtype)[None]
    sdf = 0.6 - vertices.norm(dim=-1) + 0.05 * torch.randn(1, len(vertices[0]), generator=generator)
    sdf = sdf.to(dtype)
    vertices.requires_grad_(), sdf.requires_grad_()
    (found,), (faces,), (tet_idx,) = marching_tetrahedra(vertices, tets, sdf, return_tet_idx=True)
    expected, expected_faces = reference(vertices[0].double(), sdf[0].double(), grid.tets)
    assert torch.equal(faces, expected_faces.long())
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    cotangent = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(found, (vertices, sdf), cotangent.to(dtype)),
                    torch.autograd.grad(expected, (vertices, sdf), cotangent)):
        torch.testing.assert_close(a, b, atol=1e-3 * float(b.abs().max()), rtol=0)
    # each face lies in its tet: its corners are on edges between vertices of that tet
    corners = found[faces].detach()
    middle = corners.mean(1)
    a, b, c, d = vertices.detach()[0][tets[tet_idx]].unbind(1)
    weights = torch.linalg.solve(torch.stack((b - a, c - a, d - a), 2), (middle - a)[:, :, None])[:, :, 0]
    assert weights.min() > -1e-4 and weights.sum(1).max() < 1 + 1e-4


def test_a_changed_topology_is_noticed():
    tets, sdf = TETS.clone(), torch.ones(1, 8)
    sdf[0, 4] = -1
    before = marching_tetrahedra(cube()[None], tets, sdf)
    tets[1] = torch.tensor([5, 4, 0, 6])  # turned over
    after = marching_tetrahedra(cube()[None], tets, sdf)
    assert before[1][0].tolist() != after[1][0].tolist()


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"vertices: expected shape \[B, V, 3\], got \[8, 3\]"):
        marching_tetrahedra(cube(), TETS, torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"sdf: expected shape \[1, 8\], got \[8\]"):
        marching_tetrahedra(cube()[None], TETS, torch.ones(8))
    with pytest.raises(ValueError, match="tets"):
        marching_tetrahedra(cube()[None], TETS + 4, torch.ones(1, 8))
