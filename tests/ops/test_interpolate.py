"""ops.interpolate against its reference: values, derivatives, every gradient, broadcasting, bad input."""

import pytest
import torch
from meshes import soup

from text3d_fast import native, ops, use_backend
from text3d_fast.reference.interpolate import interpolate as reference_interpolate

# (attribute shape without vertices, chosen derivatives)
CASES = [((2, 5), None), ((2, 5), "all"), ((1, 3), [2, 0, 2]), ((3,), "all"), ((1,), None), ((2, 17), [16]),
         ((0,), None)]


def make_inputs(shape, generator, device, triangles=50, size=(13, 29)):
    pos, tri = soup(triangles, 0.5, generator, device)
    pos, tri = pos[:, :60], tri % 60
    rast, rast_db = ops.rasterize(pos, tri, size)
    attr = torch.randn(*shape[:-1], pos.shape[1], shape[-1], generator=generator, device=device)
    return attr, rast, tri, rast_db


@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, device, generator, poisoned_empty):
    shape, diff_attrs = case
    attr, rast, tri, rast_db = make_inputs(shape, generator, device)
    count = shape[-1] if diff_attrs == "all" else len(diff_attrs or ())
    cotangents = [torch.randn(2, 13, 29, n, generator=generator, device=device) for n in (shape[-1], 2 * count)]

    def run(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (attr, rast, rast_db)]
        outputs = ops.interpolate(leaves[0], leaves[1], tri, leaves[2], diff_attrs)
        loss = sum((o * c.to(dtype)).sum() for o, c in zip(outputs, cotangents))
        return *outputs, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    got = run(torch.float32)
    with use_backend("reference"):
        expected = run(torch.float64)
    for g, e in zip(got, expected):  # sums of at most some hundred fp32 terms; rast_db reaches 1e3
        largest = float(e.detach().abs().max()) if e.numel() else 0
        torch.testing.assert_close(g.double(), e, rtol=1e-4, atol=1e-4 * max(1.0, largest))


def test_reference_gradcheck(generator):
    attr, rast, tri, rast_db = make_inputs((2, 3), torch.Generator().manual_seed(0), "cpu", 9, (4, 5))

    def run(attr, uv, rast_db):
        return reference_interpolate(attr, torch.cat([uv, rast[..., 2:].double()], -1), tri, rast_db, [0, 2])

    leaves = [x.double().requires_grad_() for x in (attr, rast[..., :2], rast_db)]
    torch.autograd.gradcheck(run, leaves)


def test_positions_come_back(device, generator):
    """Interpolated clip positions project to the pixel centres, and their derivatives to one pixel."""
    pos, tri = soup(20, 0.6, generator, device)
    rast, rast_db = ops.rasterize(pos, tri, (16, 24))
    xyw, d = ops.interpolate(pos[..., [0, 1, 3]].contiguous(), rast, tri, rast_db, "all")
    inside = (rast[..., 3] > 0) & (rast[..., :2] > 1e-2).all(-1) & (rast[..., :2].sum(-1) < 0.99)
    assert inside.sum() > 50
    centres = torch.stack(torch.meshgrid((2 * torch.arange(24.0) + 1) / 24 - 1, (2 * torch.arange(16.0) + 1) / 16 - 1,
                                         indexing="xy"), -1).to(device).expand(2, -1, -1, -1)
    torch.testing.assert_close((xyw[..., :2] / xyw[..., 2:])[inside], centres[inside], atol=1e-3, rtol=0)
    x, w, dx, dw = xyw[..., 0], xyw[..., 2], d[..., 0], d[..., 4]
    along_x = ((dx * w - x * dw) / w**2)[inside]
    torch.testing.assert_close(along_x, torch.full_like(along_x, 2 / 24), atol=1e-3, rtol=1e-2)


def test_gradient_does_not_depend_on_threads_or_runs(device, generator):
    attr, rast, tri, rast_db = make_inputs((5,), generator, device, 90, (61, 83))
    attr.requires_grad_()
    torch.use_deterministic_algorithms(True)
    before, grads = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, da = ops.interpolate(attr, rast, tri, rast_db, "all")
        grads.append(torch.autograd.grad(out.square().sum() + da.square().sum(), attr)[0])
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_opcheck(device, generator):
    attr, rast, tri, rast_db = make_inputs((2, 3), generator, device, 9, (5, 7))
    leaves = [x.requires_grad_() for x in (attr, rast, rast_db)]
    arguments = (leaves[0], leaves[1], tri, leaves[2], [0, 2], "native")
    torch.library.opcheck(torch.ops.text3d.interpolate.default, arguments)


def test_rasterize_and_interpolate_together(device, generator):
    """The gradient of an image to vertex positions, through both ops, against the reference."""
    pos, tri = soup(30, 0.5, generator, device)
    attr = torch.randn(90, 3, generator=generator, device=device)

    def gradient(dtype):
        leaf = pos.to(dtype).requires_grad_()
        rast, rast_db = ops.rasterize(leaf, tri, (17, 19))
        image, da = ops.interpolate(attr.to(dtype), rast, tri, rast_db, "all")
        return torch.autograd.grad(image.square().sum() + 0.1 * da.square().sum(), leaf)[0]

    got = gradient(torch.float32)
    with use_backend("reference"):
        expected = gradient(torch.float64)
    scale = expected.abs().amax()
    torch.testing.assert_close(got.double() / scale, expected / scale, rtol=1e-3, atol=1e-3)


def test_missing_triangles_and_vertices(device, monkeypatch):
    """A CPU raises, and a GPU that is asked to check; otherwise such pixels are background."""
    attr = torch.ones(3, 2, device=device)
    tri = torch.tensor([[0, 1, 2], [0, 1, 7], [-1, 0, 0]], dtype=torch.int32, device=device)
    rast = torch.zeros(1, 1, 5, 4, device=device)
    on_gpu = native.runs_cuda_source(device)
    if on_gpu:
        rast[..., 3] = torch.tensor([1.0, 2, 3, 4, 0])
        out, _ = ops.interpolate(attr.requires_grad_(), rast, tri)
        assert out[0, 0, :, 0].tolist() == [1, 0, 0, 0, 0]
        torch.autograd.grad(out.sum(), attr)
        monkeypatch.setenv("TEXT3D_CHECK", "1")
    rast[0, 0, 3, 3] = 4
    with pytest.raises(ValueError, match="rast: expected (triangles below 3|indices from -1 to 2)"):
        ops.interpolate(attr, rast, tri[:1].repeat(3, 1))
    rast[0, 0, 3, 3] = 2
    with pytest.raises(ValueError, match="tri: expected indices from 0 to 2"):
        ops.interpolate(attr, rast, tri)


def test_empty(device):
    tri = torch.zeros(0, 3, dtype=torch.int32, device=device)
    attr = torch.zeros(4, 3, device=device, requires_grad=True)
    for shape in ((0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 5, 4)):
        out, da = ops.interpolate(attr, torch.zeros(shape, device=device), tri)
        assert out.shape == (*shape[:3], 3) and da.shape == (*shape[:3], 0)
        assert torch.autograd.grad(out.sum(), attr)[0].eq(0).all()


def test_errors_name_the_argument():
    attr, rast, tri = torch.zeros(2, 4, 3), torch.zeros(2, 3, 5, 4), torch.zeros(1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="attr: expected a batch of 1 or 2"):
        ops.interpolate(torch.zeros(3, 4, 3), rast, tri)
    with pytest.raises(TypeError, match="attr: expected torch.float32"):
        ops.interpolate(attr.double(), rast, tri)
    with pytest.raises(ValueError, match="rast: expected shape"):
        ops.interpolate(attr, rast[..., :3], tri)
    with pytest.raises(ValueError, match="rast_db: expected a tensor"):
        ops.interpolate(attr, rast, tri, None, "all")
    with pytest.raises(ValueError, match="rast_db: expected shape"):
        ops.interpolate(attr, rast, tri, rast[:1], [0])
    with pytest.raises(ValueError, match="rast_db: expected device cpu"):
        ops.interpolate(attr, rast, tri, rast.to("meta"))
    with pytest.raises(ValueError, match="rast_db: expected shape"):
        ops.interpolate(attr, rast, tri, rast[:1])
    with pytest.raises(ValueError, match="diff_attrs: expected indices from 0 to 2"):
        ops.interpolate(attr, rast, tri, rast, [3])
    with pytest.raises(ValueError, match="diff_attrs: expected a list"):
        ops.interpolate(attr, rast, tri, rast, "some")
