"""ops.antialias against its reference, and its silhouette gradient against supersampled images."""

import math
import os

import pytest
import torch

from text3d_fast import native, ops, use_backend
from text3d_fast.reference.antialias import antialias as reference_antialias
from text3d_fast.reference.antialias import opposite_vertices

EMULATED = os.environ.get("TEXT3D_EMULATE") == "1"


def soup(generator, batch=2, triangles=9, dtype=torch.float32):
    """Random triangles in perspective, some reaching behind the camera."""
    random = lambda *shape: torch.rand(shape, generator=generator, device=generator.device, dtype=dtype)
    pos = torch.cat([random(batch, triangles + 2, 2) * 3 - 1.5, random(batch, triangles + 2, 1) - 0.5,
                     random(batch, triangles + 2, 1) + 0.7], -1)
    pos[:, 0, 3] = -0.2
    first = torch.arange(triangles, device=generator.device)
    tri = torch.stack([first, first + 1, first + 2], -1).int()
    return pos, tri


def polygon(corners, angle, center, device="cpu", dtype=torch.float32):
    """A regular polygon as a fan: pos [1, corners + 1, 4], tri."""
    turn = torch.arange(corners, device=device, dtype=dtype) * (2 * math.pi / corners) + angle
    ring = 0.55 * torch.stack([turn.cos(), turn.sin()], -1)
    xy = torch.cat([torch.zeros(1, 2, device=device, dtype=dtype), ring]) + center
    pos = torch.cat([xy, torch.zeros_like(xy[:, :1]), torch.ones_like(xy[:, :1])], -1)[None]
    ids = torch.arange(corners, device=device)
    tri = torch.stack([torch.zeros_like(ids), ids + 1, (ids + 1) % corners + 1], -1).int()
    return pos, tri


@pytest.mark.parametrize("size", [(1, 1), (13, 7), (33, 47)])
@pytest.mark.parametrize("batch", [1, 3])
def test_matches_reference(batch, size, device, generator, poisoned_empty):
    pos, tri = soup(generator, batch)
    rast, _ = ops.rasterize(pos, tri, size)
    color = torch.rand(batch, *size, 5, generator=generator, device=device)
    cotangent = torch.randn(color.shape, generator=generator, device=device)

    def run(backend, dtype):
        leaves = [color.to(dtype).requires_grad_(), pos.to(dtype).requires_grad_()]
        with use_backend(backend):
            out = ops.antialias(leaves[0], rast.to(dtype), leaves[1], tri, pos_gradient_boost=2.0)
        return out, *torch.autograd.grad(out, leaves, cotangent.to(dtype))

    for got, want in zip(run(None, torch.float32), run("reference", torch.float64)):
        # crossings of fp32 coordinates up to 50 pixels are good to 1e-5; gradients to pos sum terms of order 50
        scale = max(1.0, want.abs().max().item())
        torch.testing.assert_close(got, want.float(), rtol=1e-3, atol=1e-4 * scale)


def test_reference_gradcheck():
    pos, tri = polygon(5, 0.3, torch.tensor([0.07, -0.04], dtype=torch.float64), dtype=torch.float64)
    rast, _ = ops.rasterize(pos.float(), tri, (11, 12))
    generator = torch.Generator().manual_seed(0)
    color = torch.rand(1, 11, 12, 2, generator=generator, dtype=torch.float64)
    topology = opposite_vertices(tri)
    run = lambda color, pos: reference_antialias(color, rast.double(), pos, tri, topology)
    torch.autograd.gradcheck(run, [color.requires_grad_(), pos.requires_grad_()])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("corners", [3, 4, 7])
def test_silhouette_gradient_against_supersampling(corners, axis, device):
    """d/d(center) of a weighted sum of the mask, against central differences of an image with 16 samples a pixel."""
    size, fine = 96, 384
    ramp = (torch.arange(fine, device=device) / fine - 0.5).clamp(min=0)  # one side only, so that edges do not cancel
    weight = ramp.expand(fine, fine) if axis == 0 else ramp[:, None].expand(fine, fine)

    def supersampled(center):
        pos, tri = polygon(corners, 0.37, center, device)
        return ((ops.rasterize(pos, tri, (fine, fine))[0][..., 3] > 0) * weight).sum().item() * (size / fine) ** 2

    center = torch.tensor([0.031, -0.053], device=device, requires_grad=True)
    pos, tri = polygon(corners, 0.37, center, device)
    rast, _ = ops.rasterize(pos, tri, (size, size))
    mask = ops.antialias((rast[..., 3:] > 0).float(), rast, pos, tri)[..., 0]
    coarse = torch.nn.functional.avg_pool2d(weight[None, None], fine // size)[0, 0]
    gradient = torch.autograd.grad((mask * coarse).sum(), center)[0]
    offset = 0.02 * torch.eye(2, device=device)[axis]
    expected = (supersampled(center.detach() + offset) - supersampled(center.detach() - offset)) / 0.04
    # straight edges are exact; a corner has no crossing in up to 2 of the ~25 rows of its edges
    assert gradient[axis].item() == pytest.approx(expected, rel=0.08)


def test_straight_edges_blend_to_their_coverage(device):
    """A half plane whose edge runs a third into a pixel: that pixel becomes a third."""
    width = 8
    edge = (3 + 1 / 3) / width * 2 - 1
    corners = [[-3.0, -9.0, 0.0, 1.0], [edge, -9.0, 0.0, 1.0], [edge, 9.0, 0.0, 1.0], [-3.0, 9.0, 0.0, 1.0]]
    pos = torch.tensor([corners], device=device)
    tri = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32, device=device)
    rast, _ = ops.rasterize(pos, tri, (4, width))
    mask = ops.antialias((rast[..., 3:] > 0).float(), rast, pos, tri)[0, :, :, 0]
    expected = torch.tensor([1, 1, 1, 1 / 3, 0, 0, 0, 0], device=device).expand(4, -1)
    torch.testing.assert_close(mask, expected, atol=1e-5, rtol=0)  # fp32 of coordinates up to 8


def test_inner_edges_do_not_blend(device, generator):
    """Triangles of a flat square differ in id but share their edge: colours pass unchanged."""
    pos = torch.tensor([[-2.0, -2, 0, 1], [2, -2, 0, 1], [2, 2, 0, 1], [-2, 2, 0, 1]], device=device)[None]
    tri = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32, device=device)
    rast, _ = ops.rasterize(pos, tri, (9, 9))
    color = torch.rand(1, 9, 9, 3, generator=generator, device=device)
    assert torch.equal(ops.antialias(color, rast, pos, tri), color)


def test_topology():
    tri = torch.tensor([[0, 1, 2], [2, 1, 3], [4, 5, 6]], dtype=torch.int32)
    assert ops.antialias_topology(tri).tolist() == [[3, -1, -1], [-1, -1, 0], [-1, -1, -1]]
    assert ops.antialias_topology(tri[:0]).shape == (0, 3)


@pytest.mark.skipif(EMULATED, reason="the CUDA kernel adds with atomics")
def test_gradients_are_deterministic():
    generator = torch.Generator().manual_seed(0)
    pos, tri = soup(generator, 1, 60)
    rast, _ = ops.rasterize(pos, tri, (64, 64))
    color = torch.rand(1, 64, 64, 3, generator=generator)
    pos.requires_grad_()
    grads = [torch.autograd.grad(ops.antialias(color, rast, pos, tri).square().sum(), pos)[0] for _ in range(2)]
    assert torch.equal(*grads) and grads[0].abs().max() > 0


def test_deterministic_algorithms(device, generator):
    """On CUDA the gradient to pos raises torch's alert, or warns; elsewhere, and that to color, it is deterministic."""
    pos, tri = soup(generator, 1, 6)
    rast, _ = ops.rasterize(pos, tri, (16, 16))
    color = torch.rand(1, 16, 16, 3, generator=generator, device=device).requires_grad_()
    loss = lambda pos: ops.antialias(color, rast, pos, tri).sum()
    try:
        torch.use_deterministic_algorithms(True)
        torch.autograd.grad(loss(pos), color)
        if native.runs_cuda_source(device):
            with pytest.raises(RuntimeError, match="antialias.*does not have a deterministic implementation"):
                torch.autograd.grad(loss(pos.requires_grad_()), pos)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.autograd.grad(loss(pos.requires_grad_()), pos)
    finally:
        torch.use_deterministic_algorithms(False)


def test_opcheck_and_compile(device, generator):
    pos, tri = soup(generator, 2)
    rast, _ = ops.rasterize(pos, tri, (9, 11))
    color = torch.rand(2, 9, 11, 3, generator=generator, device=device).requires_grad_()
    pos, topology = pos.requires_grad_(), ops.antialias_topology(tri)
    torch.library.opcheck(torch.ops.text3d.antialias.default, (color, rast, pos, tri, topology, 1.0, "native"))


def test_empty(device):
    pos, tri = torch.zeros(1, 3, 4, device=device), torch.zeros(0, 3, dtype=torch.int32, device=device)
    color = torch.rand(1, 4, 4, 2, device=device)
    assert torch.equal(ops.antialias(color, torch.zeros(1, 4, 4, 4, device=device), pos, tri), color)
    none = torch.zeros(1, 0, 4, 4, device=device)
    assert ops.antialias(none[..., :2], none, pos, tri).shape == (1, 0, 4, 2)


def test_errors_name_the_argument(generator, device):
    pos, tri = soup(generator, 2)
    rast, color = torch.zeros(2, 4, 4, 4, device=device), torch.zeros(2, 4, 4, 3, device=device)
    for message, call in [
        ("color: expected shape", lambda: ops.antialias(color[:1], rast, pos, tri)),
        ("pos: expected shape", lambda: ops.antialias(color, rast, pos[..., :3], tri)),
        ("topology: expected shape", lambda: ops.antialias(color, rast, pos, tri, tri[:2])),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="tri: expected torch.int32"):
        ops.antialias(color, rast, pos, tri.long())


def test_missing_triangles_and_vertices(generator, device, monkeypatch):
    """A CPU raises, and a GPU that is asked to check; otherwise nothing is blended there."""
    pos, tri = soup(generator, 2)
    color = torch.rand(2, 4, 4, 3, generator=generator, device=device)
    rast = torch.zeros(2, 4, 4, 4, device=device)
    rast[:, 1:3, 1:3, 3] = 5
    topology = ops.antialias_topology(tri)
    if native.runs_cuda_source(device):
        assert torch.equal(ops.antialias(color, rast, pos, tri + 9, topology), color)
        assert torch.equal(ops.antialias(color, rast, pos, tri[:2], topology[:2]), color)
        monkeypatch.setenv("TEXT3D_CHECK", "1")
    with pytest.raises(ValueError, match="rast: expected"):
        ops.antialias(color, rast, pos, tri[:2], topology[:2])
    with pytest.raises(ValueError, match="tri: expected indices from 0 to 10"):
        ops.antialias(color, rast, pos, tri + 9, topology)
    with pytest.raises(ValueError, match="topology: expected indices from -1 to 10"):
        ops.antialias(color, rast, pos, tri, topology + 12)
