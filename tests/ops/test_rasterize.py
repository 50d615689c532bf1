"""ops.rasterize and ops.DepthPeeler: exact visibility, watertight edges, gradients, bad input."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from meshes import perspective, soup, uv_sphere
from watertight import KINDS, count_errors

from text3d_fast import native, ops, use_backend
from text3d_fast.reference import rasterize as reference

# (triangles, size, height, width): odd images, tiny and huge triangles
CASES = [(1, 0.5, 1, 1), (40, 0.5, 33, 47), (300, 0.05, 65, 31), (12, 30.0, 19, 85), (150, 0.3, 7, 130)]


@pytest.fixture
def deterministic():
    """CUDA kernels add without atomics then; CPU kernels always do."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_same_visibility(pos, tri, size, ranges=None):
    got, got_db = ops.rasterize(pos, tri, size, ranges)
    with use_backend("reference"):
        expected, expected_db = ops.rasterize(pos, tri, size, ranges)
    assert torch.equal(got[..., 3].view(torch.int32), expected[..., 3].view(torch.int32))
    # The same fp32 formulae in the same order; only fused or reordered sums on a GPU could differ.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_db, expected_db, rtol=1e-3, atol=1e-4)
    return got


@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, device, generator, poisoned_empty):
    triangles, size, height, width = case
    pos, tri = soup(triangles, size, generator, device)
    assert_same_visibility(pos, tri, (height, width))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_clipping_matches_reference(scale, device, generator, poisoned_empty):
    """Vertices on all sides of the camera: near, far and guard band, w of any sign."""
    pos = torch.randn(1, 60, 4, generator=generator, device=device) * scale
    tri = torch.randint(0, 60, (80, 3), generator=generator, device=device, dtype=torch.int32)
    got = assert_same_visibility(pos, tri, (37, 53))
    assert (got[..., 3] > 0).float().mean() > 0.5


def test_ranges_and_shared_positions(device, generator, poisoned_empty):
    pos, tri = soup(50, 0.4, generator, device, batch=1)
    ranges = torch.tensor([[0, 20], [15, 35], [7, 0]], dtype=torch.int32)
    got = assert_same_visibility(pos[0], tri, (29, 31), ranges)
    assert got[2].eq(0).all()
    ids = reference.decode_triangle_ids(got[1, ..., 3])
    assert ids[ids >= 0].min() >= 15


def test_semantics():
    """Row 0 at the bottom; u, v belong to vertices 0 and 1; perspective; z/w; background 0; the last wins a tie."""
    pos = torch.tensor([[[-1.0, -1, 0, 1], [3, -1, 0, 1], [-1, 3, 0, 1]]])
    tri = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 1, 0]], dtype=torch.int32)
    rast, db = ops.rasterize(pos, tri, (2, 4))
    assert rast[..., 3].eq(3).all()
    for row in range(2):
        for column in range(4):
            x, y = (2 * column + 1) / 4 - 1, (2 * row + 1) / 2 - 1
            weights = torch.tensor([1 - (x + 1) / 4 - (y + 1) / 4, (x + 1) / 4, (y + 1) / 4])
            torch.testing.assert_close(rast[0, row, column, :2], weights[[2, 1]])
    torch.testing.assert_close(db[0, 0, 0], torch.tensor([0, 0.25, 0.125, 0]))
    tilted = torch.tensor([[[-1.0, -1, 0, 1], [9, -3, 1.5, 3], [-1, 3, 0.5, 1]]])
    rast, _ = ops.rasterize(tilted, tri[:1], (5, 5))
    u, v = rast[0, 1, 2, 0], rast[0, 1, 2, 1]
    point = u * tilted[0, 0] + v * tilted[0, 1] + (1 - u - v) * tilted[0, 2]
    torch.testing.assert_close(point[:2] / point[3], torch.tensor([0.0, -0.4]), atol=1e-5, rtol=0)
    torch.testing.assert_close(rast[0, 1, 2, 2], point[2] / point[3])


def test_large_indices_survive_the_float_channel():
    ids = torch.tensor([-1, 0, 5, (1 << 24) - 2, (1 << 24) - 1, 1 << 24, (1 << 24) + 1, reference.LARGEST_ID - 2])
    assert torch.equal(reference.decode_triangle_ids(reference.encode_triangle_ids(ids.int())), ids.int())


@pytest.mark.skipif("not __import__('os').environ.get('TEXT3D_LARGE_TESTS')", reason="TEXT3D_LARGE_TESTS is not set")
def test_more_than_2_to_24_triangles():
    count = (1 << 24) + 1000
    tri = torch.zeros(count, 3, dtype=torch.int32)
    tri[-7] = torch.tensor([0, 1, 2])
    pos = torch.tensor([[[-1.0, -1, 0, 1], [3, -1, 0, 1], [-1, 3, 0, 1]]])
    rast, _ = ops.rasterize(pos, tri, (3, 3))
    assert reference.decode_triangle_ids(rast[..., 3]).eq(count - 7).all()


def run_with(isa: str) -> str:
    environment = {**os.environ, "TEXT3D_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["TEXT3D_EMULATE"] = "1" if isa == "emulated" else "0"
    program = (
        "import torch, hashlib; from meshes import soup; from text3d_fast import ops; torch.set_num_threads(THREADS)\n"
        "g = torch.Generator().manual_seed(3); digest = hashlib.sha256()\n"
        "for n, s in ((200, 0.3), (2000, 0.02), (20, 9.0), (50, 0)):\n"
        "    pos, tri = soup(n, s, g)\n"
        "    pos = pos if s else torch.randn(pos.shape, generator=g) * 5\n"
        "    digest.update(ops.rasterize(pos, tri, (71, 93))[0][..., 3].numpy().tobytes())\n"
        "print(digest.hexdigest())"
    ).replace("THREADS", "1" if isa == "avx2" else "2")
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_indices_are_identical_for_every_instruction_set_and_thread_count():
    assert len({run_with(isa) for isa in ("baseline", "avx2", "avx512")}) == 1


@pytest.mark.skipif(find_spec("text3d_fast._C_emulated") is None, reason="TEXT3D_EMULATE=1 python setup.py build_ext")
def test_indices_of_the_emulated_cuda_kernels_are_those_of_the_cpu():
    assert run_with("emulated") == run_with("avx2")


def test_gradients_do_not_depend_on_threads_or_runs(device, generator, deterministic):
    pos, tri = soup(400, 0.2, generator, device)
    pos = pos.requires_grad_()
    grads = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        rast, db = ops.rasterize(pos, tri % 90, (61, 83))
        grads.append(torch.autograd.grad(rast[..., :2].square().sum() + db.square().sum(), pos)[0])
    torch.set_num_threads(before)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("kind", KINDS)
def test_watertight(kind):
    cracks, doubles, edges = count_errors(kind, 2000, seed=1)
    assert (cracks, doubles) == (0, 0)
    assert edges >= 2000


@pytest.mark.parametrize("grad_db", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_match_reference(shared, grad_db, device, generator, poisoned_empty):
    pos, tri = soup(80, 0.4, generator, device)
    ranges = torch.tensor([[0, 60], [30, 50]], dtype=torch.int32) if shared else None
    pos = pos[0] if shared else pos
    cotangents = [torch.randn(2, 35, 51, 4, generator=generator, device=device) for _ in range(2)]

    def gradient(dtype):
        leaf = pos.to(dtype).requires_grad_()
        outputs = ops.rasterize(leaf, tri, (35, 51), ranges, grad_db)
        loss = sum((o * c.to(dtype)).sum() for o, c in zip(outputs, cotangents))
        return torch.autograd.grad(loss, leaf)[0]

    got = gradient(torch.float32)
    with use_backend("reference"):
        expected = gradient(torch.float64)
    assert got[..., 2].eq(0).all()
    # Quotients of fp32 areas: slivers of relative area 1e-4 lose four digits.
    scale = expected.abs().amax()
    torch.testing.assert_close(got.double() / scale, expected / scale, rtol=1e-3, atol=1e-3)


def test_reference_gradcheck():
    generator = torch.Generator().manual_seed(0)
    pos, tri = soup(6, 0.8, generator)
    size = (5, 7)
    pos = pos.double()
    keys = reference.rasterize(pos, tri, size)[2]

    def run(xyw):
        moved = torch.stack([xyw[..., 0], xyw[..., 1], pos[..., 2], xyw[..., 2]], -1)
        rast, db = reference.resolve(moved, tri, keys, True)
        inside = ((rast[..., :2] > 1e-3).all(-1) & (rast[..., :2].sum(-1) < 1 - 1e-3))[..., None].detach()
        return rast[..., :2] * inside, db * inside

    assert (keys != reference.NOTHING).sum() > 20
    torch.autograd.gradcheck(run, pos[..., [0, 1, 3]].clone().requires_grad_())


def finite_differences(pos, tri, pixel, size, epsilon=1e-6):
    """d(u + 2 v) of one pixel by x, y, w of each corner, by central differences of the formula in float64."""
    corners = pos[tri.long()].double()
    height, width = size
    fx, fy = (2 * pixel[1] + 1) / width - 1, (2 * pixel[0] + 1) / height - 1

    def value(corners):
        q = corners[:, :2] - corners[:, 3:] * torch.tensor([fx, fy], dtype=torch.float64)
        cross = lambda a, b: a[0] * b[1] - a[1] * b[0]
        a = torch.stack([cross(q[1], q[2]), cross(q[2], q[0]), cross(q[0], q[1])])
        return (a[0] + 2 * a[1]) / a.sum()

    grad = torch.zeros(3, 4, dtype=torch.float64)
    size = (corners[:, :2] - corners[:1, :2]).abs().max()
    for i in range(3):
        for k in (0, 1, 3):
            step = torch.zeros_like(corners)
            step[i, k] = epsilon * size
            grad[i, k] = (value(corners + step) - value(corners - step)) / (2 * epsilon * size)
    return grad


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e4])
@pytest.mark.parametrize("pixels, size", [(30.0, 64), (1.0, 64), (0.5, 1024), (0.25, 1024)])
def test_gradients_of_small_triangles(pixels, size, scale, backend, device):
    """Triangles of a quarter pixel, and clip coordinates times any number, have the gradient of the formula."""
    if native.emulated() and size > 64:
        pytest.skip("a picture of 1024 x 1024 takes the emulation minutes")
    pixel = (size // 2 + 1, size // 2 - 2)
    centre = torch.tensor([2 * pixel[1] + 1, 2 * pixel[0] + 1]) / size - 1
    shape = torch.tensor([[-0.4, -0.5], [0.7, -0.3], [-0.1, 0.6]])
    xy = centre + shape * (2 * pixels / size)
    w = torch.tensor([1.0, 1.5, 0.8])[:, None]
    pos = (torch.cat([xy * w, 0.1 * w, w], 1) * scale).to(device)
    tri = torch.tensor([[0, 1, 2]], dtype=torch.int32, device=device)
    rows, columns = slice(pixel[0], pixel[0] + 1), slice(pixel[1], pixel[1] + 1)
    with use_backend(backend):
        leaf = pos[None].requires_grad_()
        rast, _ = ops.rasterize(leaf, tri, (size, size))
        cell = rast[0, rows, columns]
        assert cell[..., 3].item() == 1
        got = torch.autograd.grad(cell[..., 0].sum() + 2 * cell[..., 1].sum(), leaf)[0][0].cpu().double()
    want = finite_differences(pos.cpu(), tri[0].cpu(), pixel, (size, size))
    # vertices in float32 lie 6e-8 away from where they should: 3e-8 size of a triangle of one pixel, and its square
    tolerance = max(1e-4, 4e-7 * size / pixels)
    torch.testing.assert_close(got / want.abs().max(), want / want.abs().max(), rtol=0, atol=tolerance)


def test_edge_on_triangles_cover_nothing_and_have_no_gradient(device):
    """As in pytorch3d's issue 110."""
    corners = [[0.7922, -0.1992, 0.6885, 1], [0.8408, -0.1622, 0.68568, 1], [0.7922, -0.1992, 0.689, 1]]
    pos = torch.tensor([corners], device=device, requires_grad=True)
    tri = torch.tensor([[0, 1, 2]], dtype=torch.int32, device=device)
    rast, db = ops.rasterize(pos, tri, (128, 128))
    assert rast.eq(0).all()
    assert torch.autograd.grad(rast.sum() + db.sum(), pos)[0].eq(0).all()


def test_peeling_keeps_coincident_layers(device, generator, poisoned_empty):
    quad = torch.tensor([[-1.0, -1, 0, 1], [1, -1, 0, 1], [1, 1, 0, 1], [-1, 1, 0, 1]], device=device)
    pos = torch.cat([quad, quad * torch.tensor([0.5, 0.5, 1, 1], device=device) + torch.tensor([0, 0, -0.3, 0.0],
                                                                                               device=device)])[None]
    tri = torch.tensor([[0, 1, 2], [0, 2, 3], [2, 1, 0], [3, 2, 0], [4, 5, 6], [4, 6, 7]], device=device).int()
    layers = []
    with ops.DepthPeeler(pos, tri, (8, 8)) as peeler:
        for _ in range(4):
            layers.append(peeler.rasterize_next_layer()[0][0, ..., 3])
    centre, corner = (4, 3), (0, 6)
    assert [layer[corner].item() for layer in layers] == [3, 1, 0, 0]
    assert [layer[centre].item() for layer in layers] == [6, 4, 2, 0]
    with pytest.raises(RuntimeError, match="within"):
        peeler.rasterize_next_layer()


def test_peeling_matches_reference(device, generator, poisoned_empty):
    pos, tri = soup(60, 0.5, generator, device)
    layers = []
    for backend in (None, "reference"):
        with use_backend(backend), ops.DepthPeeler(pos, tri, (23, 41)) as peeler:
            layers.append(torch.stack([peeler.rasterize_next_layer()[0] for _ in range(5)]))
    assert torch.equal(layers[0][..., 3], layers[1][..., 3])
    depth = layers[0][..., 2]
    seen = layers[0][1:, ..., 3] > 0
    assert (depth[1:] >= depth[:-1] - 1e-3)[seen].all()


def test_peeler_passes_gradients(device, generator):
    pos, tri = soup(20, 0.5, generator, device)
    pos.requires_grad_()
    with ops.DepthPeeler(pos, tri, (16, 16)) as peeler:
        peeler.rasterize_next_layer()
        rast, db = peeler.rasterize_next_layer()
    assert torch.autograd.grad(rast[..., :2].sum() + db.sum(), pos)[0].abs().sum() > 0


def test_opcheck(device, generator):
    pos, tri = soup(9, 0.5, generator, device)
    arguments = (pos.requires_grad_(), tri, None, None, 9, 11, True, True, "native")
    torch.library.opcheck(torch.ops.text3d.rasterize.default, arguments, atol=1e-4, rtol=1e-4)


def test_compiles_whole(device, generator):
    pos, tri = soup(9, 0.5, generator, device)
    pos.requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(pos):
        rast, db = ops.rasterize(pos * 1.5, tri, (9, 11))
        return rast[..., :2].square().sum() + db.square().sum()

    expected = torch.autograd.grad(loss._torchdynamo_orig_callable(pos), pos)
    torch.testing.assert_close(torch.autograd.grad(loss(pos), pos), expected)


def test_empty_inputs(device):
    none = torch.zeros(0, 3, dtype=torch.int32, device=device)
    pos = torch.zeros(2, 5, 4, device=device, requires_grad=True)
    rast, db = ops.rasterize(pos, none, (4, 6))
    assert rast.shape == db.shape == (2, 4, 6, 4)
    assert rast.eq(0).all() and db.eq(0).all()
    assert torch.autograd.grad(rast.sum(), pos)[0].eq(0).all()
    triangle = torch.tensor([[0, 1, 2]], dtype=torch.int32, device=device)
    for size in ((0, 6), (4, 0), (0, 0)):
        rast, db = ops.rasterize(pos, triangle, size)
        assert rast.shape == (2, *size, 4)
    rast, _ = ops.rasterize(torch.zeros(0, 5, 4, device=device), triangle, (4, 6))
    assert rast.shape == (0, 4, 6, 4)
    rast, _ = ops.rasterize(torch.zeros(1, 0, 4, device=device), none, (4, 6))
    assert rast.eq(0).all()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("component", range(4))
def test_non_finite_vertices(component, bad, backend, device, monkeypatch):
    """Triangles that use one are not drawn, the rest is, with its gradients; TEXT3D_CHECK=1 raises."""
    corners = [[-1.0, -1, 0, 1], [3, -1, 0, 1], [-1, 3, 0, 1], [-1, -1, 0.5, 1], [3, -1, 0.5, 1], [-1, 3, 0.5, 1]]
    pos = torch.tensor([corners, corners], device=device)
    pos[0, 1, component] = bad
    tri = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32, device=device)
    with use_backend(backend):
        leaf = pos.requires_grad_()
        rast, db = ops.rasterize(leaf, tri, (4, 4))
        assert rast[0, ..., 3].eq(2).all() and rast[1, ..., 3].eq(1).all()
        grad = torch.autograd.grad(rast[..., :2].square().sum() + db.square().sum(), leaf)[0]
        assert grad.isfinite().all() and grad[0, :3].eq(0).all() and grad[0, 3:].ne(0).any()
        monkeypatch.setenv("TEXT3D_CHECK", "1")
        with pytest.raises(ValueError, match="pos: expected finite coordinates, got NaN or infinity"):
            ops.rasterize(pos, tri, (4, 4))


def test_degenerate_triangles_cover_nothing(device):
    pos = torch.tensor([[[-1.0, -1, 0, 1], [1, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [-1, 1, 0, -1]]], device=device)
    tri = torch.tensor([[0, 1, 2], [0, 0, 1], [1, 1, 1], [3, 3, 3], [0, 1, 3], [4, 4, 4]], device=device).int()
    rast, _ = ops.rasterize(pos, tri, (8, 8))
    assert rast.eq(0).all()


def test_behind_the_camera_is_not_seen(device):
    pos = torch.tensor([[[-1.0, -1, 0, -1], [3, -1, 0, -1], [-1, 3, 0, -1]]], device=device)
    rast, _ = ops.rasterize(pos, torch.tensor([[0, 1, 2]], dtype=torch.int32, device=device), (4, 4))
    assert rast.eq(0).all()


def test_sphere_is_round(device):
    vertices, tri = uv_sphere(2000)
    pos = perspective(vertices)[None].to(device)
    rast, _ = ops.rasterize(pos, tri.to(device), (64, 64))
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    radius = 32 / torch.tan(torch.tensor(20.0).deg2rad()) / (3.2**2 - 1) ** 0.5
    distance = (x**2 + y**2).sqrt()
    covered = rast[0, ..., 3].cpu() > 0
    assert covered[distance < radius - 1].all() and not covered[distance > radius + 1].any()


def test_errors_name_the_argument():
    pos, tri = torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"pos: expected shape"):
        ops.rasterize(pos[..., :3], tri, (4, 4))
    with pytest.raises(TypeError, match=r"pos: expected torch.float32"):
        ops.rasterize(pos.double(), tri, (4, 4))
    with pytest.raises(TypeError, match=r"tri: expected torch.int32"):
        ops.rasterize(pos, tri.long(), (4, 4))
    with pytest.raises(ValueError, match=r"tri: expected device|pos: expected device"):
        ops.rasterize(pos, tri.to("meta"), (4, 4))
    for resolution in (4, (4.5, 4), ("4", 4), (None, 4), (8.0, 8.0)):
        with pytest.raises(TypeError, match=r"resolution(\[0\])?: expected (two integers|an integer)"):
            ops.rasterize(pos, tri, resolution)
    with pytest.raises(ValueError, match=r"resolution: expected sizes"):
        ops.rasterize(pos, tri, (-1, 4))
    with pytest.raises(ValueError, match=r"ranges: expected an int32 tensor"):
        ops.rasterize(pos[0], tri, (4, 4))
    with pytest.raises(ValueError, match=r"ranges: expected None"):
        ops.rasterize(pos, tri, (4, 4), torch.zeros(1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"ranges: expected \(start, count\)"):
        ops.rasterize(pos[0], tri, (4, 4), torch.tensor([[0, 2]], dtype=torch.int32))


def test_ranges_are_checked_in_compiled_code(device):
    """Their values come at run time: a count beyond the triangles once read beyond tri."""
    pos = torch.tensor([[-1.0, -1, 0, 1], [3, -1, 0, 1], [-1, 3, 0, 1]], device=device)
    tri = torch.tensor([[0, 1, 2]], dtype=torch.int32, device=device)
    draw = torch.compile(lambda ranges: ops.rasterize(pos, tri, (4, 4), ranges)[0], fullgraph=True, backend="aot_eager")
    assert draw(torch.tensor([[0, 1]], dtype=torch.int32))[..., 3].eq(1).all()
    for wrong in ([[0, 1 << 30]], [[-1, 1]], [[1, 1]], [[2**31 - 1, 2**31 - 1]]):
        with pytest.raises(ValueError, match=r"ranges: expected \(start, count\) within 1 triangles"):
            draw(torch.tensor(wrong, dtype=torch.int32))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("batch, vertices, faces", [(0, 3, 1), (2, 0, 0), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_draw(batch, vertices, faces, backend, device):
    pos = torch.zeros(batch, vertices, 4, device=device, requires_grad=True)
    tri = torch.zeros(faces, 3, dtype=torch.int32, device=device)
    with use_backend(backend):
        rast, db = ops.rasterize(pos, tri, (3, 5))
        attr, _ = ops.interpolate(pos, rast, tri)
        image = ops.antialias(attr, rast, pos, tri)
        with ops.DepthPeeler(pos, tri, (3, 5)) as peeler:
            layer, _ = peeler.rasterize_next_layer()
        assert rast.shape == db.shape == layer.shape == (batch, 3, 5, 4) and image.eq(0).all() and rast.eq(0).all()
        total = rast.sum() + db.sum() + image.sum() + layer.sum()
        if total.requires_grad:
            assert torch.autograd.grad(total, pos)[0].shape == pos.shape


@pytest.mark.skipif(os.environ.get("TEXT3D_EMULATE") == "1", reason="CUDA kernels skip such triangles")
@pytest.mark.parametrize("index", [-1, 3, 2**31 - 1])
def test_indices_out_of_range_raise(index):
    tri = torch.zeros(40, 3, dtype=torch.int32)
    tri[33, 1] = index
    with pytest.raises(ValueError, match="tri: expected indices from 0 to 2"):
        ops.rasterize(torch.rand(1, 3, 4), tri, (4, 4))
