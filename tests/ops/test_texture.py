"""ops.texture: every filter and boundary against the reference, its gradients, and what a texture must satisfy."""

import math
import os

import pytest
import torch

from text3d_fast import native, ops, use_backend
from text3d_fast.reference.texture import CUBE_FACES
from text3d_fast.reference.texture import texture as reference_texture

FILTERS = ["nearest", "linear", "linear-mipmap-nearest", "linear-mipmap-linear"]
BOUNDARIES = ["wrap", "clamp", "zero", "cube"]


def make_inputs(boundary, generator, batch=2, tex_batch=2, size=(8, 16), channels=3, image=(5, 7), dtype=torch.float32):
    random = lambda *shape: torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    cube = boundary == "cube"
    tex = random(tex_batch, 6, 8, 8, channels) if cube else random(tex_batch, *size, channels)
    uv = random(batch, *image, 3) if cube else random(batch, *image, 2) * 0.7 + 0.5
    uv_da = random(batch, *image, 6 if cube else 4) * 0.15
    bias = random(batch, *image) * 0.3
    return tex, uv, uv_da, bias


def run(inputs, filter_mode, boundary):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = ops.texture(*leaves, filter_mode=filter_mode, boundary_mode=boundary)
    cotangent = torch.cos(torch.arange(out.numel(), device=out.device)).reshape(out.shape).to(out.dtype)
    return out, torch.autograd.grad(out, leaves, cotangent, allow_unused=True)


@pytest.mark.parametrize("tex_batch", [1, 2])
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("filter_mode", FILTERS)
def test_matches_reference(filter_mode, boundary, tex_batch, device, generator, poisoned_empty):
    inputs = make_inputs(boundary, generator, tex_batch=tex_batch)
    out, grads = run(inputs, filter_mode, boundary)
    with use_backend("reference"):
        expected, expected_grads = run([x.double() for x in inputs], filter_mode, boundary)
    # fp32 coordinates times 16 texels leave 1e-6 of a texel; values and gradients are of order 1 to 10
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-4)
    for got, want in zip(grads, expected_grads):
        want = torch.zeros_like(got) if want is None and got is not None else want
        if got is not None:
            torch.testing.assert_close(got, want.float(), rtol=1e-3, atol=1e-3)
        else:
            assert want is None or want.eq(0).all()


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_reference_gradcheck(boundary):
    generator = torch.Generator().manual_seed(3)
    tex, uv, uv_da, bias = make_inputs(boundary, generator, batch=1, tex_batch=1, size=(4, 8), channels=2, image=(2, 3),
                                       dtype=torch.float64)
    mips = [tex, *ops.mip_stack(tex, boundary_mode=boundary)]

    def linear(uv, *mips):
        return reference_texture(mips, uv, None, None, "linear", boundary)

    def trilinear(uv_da, bias, *mips):
        return reference_texture(mips, uv, uv_da, bias, "linear-mipmap-linear", boundary)

    torch.autograd.gradcheck(linear, [uv.requires_grad_(), tex.requires_grad_()])
    uv = uv.detach()
    torch.autograd.gradcheck(trilinear, [uv_da.requires_grad_(), bias.requires_grad_(), *(m.detach() for m in mips)])


def test_texel_centres_return_texels(device, generator):
    tex, *_ = make_inputs("wrap", generator, tex_batch=1)
    height, width = tex.shape[1:3]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    uv = torch.stack([(columns + 0.5) / width, (rows + 0.5) / height], -1)[None].to(device)
    for filter_mode in ("nearest", "linear"):
        for boundary in ("wrap", "clamp", "zero"):
            torch.testing.assert_close(ops.texture(tex, uv, filter_mode=filter_mode, boundary_mode=boundary), tex)


def test_cube_is_seamless(device):
    """A linear function of the direction, written into the texels, comes back continuous across edges and corners."""
    size = 16
    grid = (torch.arange(size) + 0.5) / size * 2 - 1
    t, s = torch.meshgrid(grid, grid, indexing="ij")
    faces = []
    for axis, sign, s_axis, s_sign, t_axis, t_sign in CUBE_FACES:
        direction = torch.zeros(size, size, 3)
        direction[..., axis], direction[..., s_axis], direction[..., t_axis] = sign, s * s_sign, t * t_sign
        faces.append(torch.nn.functional.normalize(direction, dim=-1))
    tex = torch.stack(faces)[None].to(device)
    generator = torch.Generator(device).manual_seed(0)
    uv = torch.randn(1, 200, 200, 3, generator=generator, device=device)
    uv[0, :50, :, 1] = uv[0, :50, :, 0]  # exactly on edges
    uv[0, :10, :, 2] = uv[0, :10, :, 0]  # and corners
    uv = torch.nn.functional.normalize(uv, dim=-1)
    out = ops.texture(tex, uv, boundary_mode="cube")
    # bilinear error of a unit sphere over texels of 2/16: (1/8) h^2 |f''| ~ 2e-3; a corner misses up to half a texel
    error = (out - uv).norm(dim=-1)
    assert error[0, 50:].max() < 0.03 and error.max() < 0.08
    nudged = ops.texture(tex, uv + 1e-6 * torch.randn_like(uv), boundary_mode="cube")
    assert (nudged - out).abs().max() < 1e-3


def test_mip_level_follows_the_footprint(device):
    """A footprint of 2^k texels reads level k: stacks whose levels hold their own number."""
    tex = torch.zeros(1, 16, 16, 1, device=device)
    mip = [torch.full((1, 16 >> k, 16 >> k, 1), float(k), device=device) for k in range(1, 5)]
    uv = torch.full((1, 1, 5, 2), 0.5, device=device)
    span = torch.tensor([1.0, 2.0, 4.0, 8.0, 64.0], device=device) / 16
    uv_da = torch.stack([span, span * 0, span * 0, span * 0.1], -1)[None, None]
    out = ops.texture(tex, uv, uv_da, mip=mip)[0, 0, :, 0]
    torch.testing.assert_close(out, torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], device=device))


def test_custom_levels_get_their_own_gradients(device, generator):
    tex, uv, uv_da, bias = make_inputs("wrap", generator)
    mip = [m.detach().requires_grad_() for m in ops.mip_stack(tex)]
    tex.requires_grad_()
    out = ops.texture(tex, uv, uv_da, bias + 1.0, mip=mip)
    grads = torch.autograd.grad(out.sum(), [tex, *mip])
    assert sum(g.sum() for g in grads).item() == pytest.approx(out.numel(), rel=1e-4)


def test_gradients_are_deterministic(generator, device):
    if device.type == "cuda" or os.environ.get("TEXT3D_EMULATE") == "1":
        pytest.skip("the CUDA kernel adds with atomics")
    inputs = make_inputs("wrap", generator, image=(65, 67))
    threads = torch.get_num_threads()
    first = run(inputs, "linear-mipmap-linear", "wrap")[1]
    torch.set_num_threads(1)
    second = run(inputs, "linear-mipmap-linear", "wrap")[1]
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_opcheck(device, generator):
    tex, uv, uv_da, bias = make_inputs("wrap", generator)
    mips = [tex.requires_grad_(), *(m.detach() for m in ops.mip_stack(tex.detach()))]
    arguments = (mips, uv.requires_grad_(), uv_da, bias, 3, 0, "native")
    torch.library.opcheck(torch.ops.text3d.texture.default, arguments)


def test_compiles_whole(device, generator):
    inputs = make_inputs("wrap", generator)
    compiled = torch.compile(lambda *x: ops.texture(*x), fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in inputs]
    expected = torch.autograd.grad(ops.texture(*leaves).square().sum(), leaves)
    got = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    torch.testing.assert_close(got, expected)


def test_empty_image(device, generator):
    tex, *_ = make_inputs("wrap", generator, tex_batch=1)
    tex.requires_grad_()
    out = ops.texture(tex, torch.zeros(1, 0, 4, 2, device=device))
    assert out.shape == (1, 0, 4, 3)
    assert torch.autograd.grad(out.sum(), tex)[0].eq(0).all()


def test_errors_name_the_argument(generator, device):
    tex, uv, uv_da, bias = make_inputs("wrap", generator)
    for message, call in [
        ("boundary_mode: expected one of", lambda: ops.texture(tex, uv, boundary_mode="mirror")),
        ("filter_mode: expected auto", lambda: ops.texture(tex, uv, filter_mode="cubic")),
        ("uv: expected shape", lambda: ops.texture(tex, uv[0])),
        ("tex: expected a batch of 1 or 2, got 3", lambda: ops.texture(torch.cat([tex, tex[:1]]), uv)),
        ("uv_da: expected shape", lambda: ops.texture(tex, uv, uv_da[..., :3])),
        ("tex: expected even sides for mip level 1, got 7 x 16", lambda: ops.texture(tex[:, :7], uv, uv_da)),
        ("uv_da: filter_mode linear-mipmap-linear needs", lambda: ops.texture(tex, uv, filter_mode=FILTERS[3])),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="uv: expected torch.float32"):
        ops.texture(tex, uv.double())


def test_largest_level_that_works_is_named(device, generator):
    tex, uv, uv_da, _ = make_inputs("wrap", generator, size=(48, 20))
    with pytest.raises(ValueError, match=r"level 3, got 12 x 5 \(from 48 x 20\); max_mip_level=2 is the largest"):
        ops.texture(tex, uv, uv_da)
    assert ops.texture(tex, uv, uv_da, max_mip_level=2).isfinite().all()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("filter_mode", FILTERS)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_no_place_samples_zero_and_passes_no_gradient(boundary, filter_mode, backend, device, generator, monkeypatch):
    """NaN and infinite coordinates, and the direction 0 of every background pixel of an environment lookup."""
    inputs = make_inputs(boundary, generator, image=(1, 6))
    good = run(inputs, filter_mode, boundary)
    bad = [math.nan, math.inf, -math.inf]
    for i, value in enumerate(bad):
        inputs[1][:, 0, i, i % 2] = value
    none = [0, 1, 2]
    if boundary == "cube":
        inputs[1][:, 0, 3] = 0.0
        none.append(3)
    with use_backend(backend):
        out, grads = run(inputs, filter_mode, boundary)
    assert out[:, 0, none].eq(0).all()
    torch.testing.assert_close(out[:, 0, 4:], good[0][:, 0, 4:])
    assert grads[0].isfinite().all()
    for grad, clean in zip(grads[1:], good[1][1:]):
        if grad is not None and clean is not None:
            assert grad[:, 0, none].eq(0).all()
            torch.testing.assert_close(grad[:, 0, 4:], clean[:, 0, 4:], rtol=1e-4, atol=1e-4)
    monkeypatch.setenv("TEXT3D_CHECK", "1")
    with pytest.raises(ValueError, match="uv: expected finite"), use_backend(backend):
        run(inputs, filter_mode, boundary)


def test_the_direction_zero_is_no_error_where_values_are_checked(device, monkeypatch):
    monkeypatch.setenv("TEXT3D_CHECK", "1")
    tex = torch.rand(1, 6, 4, 4, 3, device=device)
    out = ops.texture(tex, torch.zeros(1, 1, 1, 3, device=device), filter_mode="linear", boundary_mode="cube")
    assert out.eq(0).all()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_huge_directions(backend, device, generator):
    """Their length overflows, the texel does not."""
    tex = torch.rand(1, 6, 4, 4, 3, generator=generator, device=device)
    direction = torch.tensor([2.0, 1.0, 1.0], device=device).view(1, 1, 1, 3)
    with use_backend(backend):
        out = [ops.texture(tex, direction * scale, boundary_mode="cube") for scale in (1.0, 1e38)]
    torch.testing.assert_close(out[1], out[0])


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("boundary", ["wrap", "cube"])
def test_nan_footprints_read_the_finest_level(boundary, backend, device, generator, monkeypatch):
    tex, uv, uv_da, bias = make_inputs(boundary, generator, image=(1, 3))
    uv_da[:, 0, 0, 1] = math.nan
    bias[:, 0, 1] = math.nan
    with use_backend(backend):
        out, grads = run((tex, uv, uv_da, bias), FILTERS[3], boundary)
        fine = ops.texture(tex, uv, filter_mode="linear", boundary_mode=boundary)
    torch.testing.assert_close(out[:, 0, 1], fine[:, 0, 1])
    torch.testing.assert_close(out[:, 0, 0] if bias[0, 0, 0] < 0 else fine[:, 0, 0], fine[:, 0, 0])
    assert grads[2][:, 0, 0].eq(0).all() and grads[3][:, 0, 1].eq(0).all() and grads[1].isfinite().all()
    monkeypatch.setenv("TEXT3D_CHECK", "1")
    with pytest.raises(ValueError, match="uv_da: expected numbers, got NaN"):
        ops.texture(tex, uv, uv_da, boundary_mode=boundary)
    with pytest.raises(ValueError, match="mip_level_bias: expected numbers, got NaN"):
        ops.texture(tex, uv, None, bias, boundary_mode=boundary)


@pytest.mark.parametrize("compiled", [False, True])
def test_levels_that_would_be_read_out_of_bounds_are_refused(compiled, device, generator):
    """Once the end of the process: a batch that is neither 1 nor that of uv, no texels, cube faces that are oblong."""
    tex, uv, uv_da, _ = make_inputs("wrap", generator, batch=4, tex_batch=4)
    cube, direction, direction_da, _ = make_inputs("cube", generator)
    sample = torch.compile(ops.texture, backend="eager") if compiled else ops.texture
    level = lambda *shape: [torch.zeros(shape, device=device)]
    error = ValueError if not compiled else Exception
    for mip, message in [
        (level(2, 4, 8, 3), r"mip\[0\]: expected a batch of 1 or 4, got 2"),
        (level(0, 4, 8, 3), r"mip\[0\]: expected a batch of 1 or 4, got 0"),
        (level(4, 0, 8, 3), r"mip\[0\]: expected at least one texel"),
        (level(1, 4, 0, 3), r"mip\[0\]: expected at least one texel"),
    ]:
        with pytest.raises(error, match=message):
            sample(tex, uv, uv_da, mip=mip)
    with pytest.raises(error, match=r"mip\[0\]: expected square cube faces"):
        sample(cube, direction, direction_da, mip=level(2, 6, 4, 2, 3), boundary_mode="cube")
    with pytest.raises(error, match=r"tex: expected a batch of 1 or (4|s\d+), got 0"):  # s: a symbolic size
        sample(tex[:0], uv)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("filter_mode", FILTERS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_images(shape, filter_mode, backend, device):
    tex = torch.rand(shape[0], 8, 8, 3, device=device, requires_grad=True)
    with use_backend(backend):
        out = ops.texture(tex, torch.rand(*shape, 2, device=device), torch.rand(*shape, 4, device=device),
                          filter_mode=filter_mode)
        assert out.shape == (*shape, 3)
        assert torch.autograd.grad(out.sum(), tex)[0].shape == tex.shape


def test_gradients_of_a_texel_that_millions_of_pixels_see(device):
    """In sequential float32 sums 0.98 came out of 4M pixels."""
    tex = torch.zeros(1, 1, 1, 1, device=device, requires_grad=True)
    side = 200 if native.emulated() else 2048  # the emulation takes a minute for a million
    uv = torch.full((1, side, side, 2), 0.5, device=device)
    grad = torch.autograd.grad(ops.texture(tex, uv, filter_mode="linear").mean(), tex)[0]
    assert grad.item() == pytest.approx(1.0, rel=1e-6)


def test_deterministic_algorithms(device, generator):
    """On CUDA the gradient to texels raises torch's alert, or warns; elsewhere it is deterministic."""
    tex, uv, *_ = make_inputs("wrap", generator)
    gradient = lambda: torch.autograd.grad(ops.texture(tex.requires_grad_(), uv).sum(), tex)
    try:
        torch.use_deterministic_algorithms(True)
        if native.runs_cuda_source(device):
            with pytest.raises(RuntimeError, match="texture.*does not have a deterministic implementation"):
                gradient()
        else:
            gradient()
        torch.use_deterministic_algorithms(True, warn_only=True)
        gradient()
    finally:
        torch.use_deterministic_algorithms(False)
