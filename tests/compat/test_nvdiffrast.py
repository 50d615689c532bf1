"""The nvdiffrast drop-in: its signatures, its import under the original's name, and real work done through it."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import text3d_fast.compat.nvdiffrast.torch as dr

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

SIGNATURES = {
    "rasterize": "(glctx, pos, tri, resolution, ranges=None, grad_db=True)",
    "interpolate": "(attr, rast, tri, rast_db=None, diff_attrs=None)",
    "texture": "(tex, uv, uv_da=None, mip_level_bias=None, mip=None, filter_mode='auto', boundary_mode='wrap', "
               "max_mip_level=None)",
    "texture_construct_mip": "(tex, max_mip_level=None, cube_mode=False)",
    "antialias": "(color, rast, pos, tri, topology_hash=None, pos_gradient_boost=1.0)",
    "antialias_construct_topology_hash": "(tri)",
    "DepthPeeler": "(glctx, pos, tri, resolution, ranges=None, grad_db=True)",
    "RasterizeCudaContext": "(device=None)",
    "RasterizeGLContext": "(output_db=True, mode='automatic', device=None)",
    "get_log_level": "()",
    "set_log_level": "(level)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_original_signatures(name):
    assert str(inspect.signature(getattr(dr, name))) == SIGNATURES[name]


def test_install_under_the_original_name():
    code = ("import text3d_fast.compat as c; c.install('nvdiffrast'); import nvdiffrast.torch as dr; "
            "print(dr.RasterizeGLContext().__class__.__module__)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "text3d_fast.compat.nvdiffrast.torch.ops"


def test_context_and_peeler_misuse():
    pos = torch.tensor([[[-1.0, -1, 0, 1], [1, -1, 0, 1], [0, 1, 0, 1]]])
    tri = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    context = dr.RasterizeCudaContext()
    with pytest.raises(TypeError, match="glctx"):
        dr.rasterize(None, pos, tri, (4, 4))
    with dr.DepthPeeler(context, pos, tri, (4, 4)) as peeler:
        rast, _ = peeler.rasterize_next_layer()
        with pytest.raises(RuntimeError, match="while a DepthPeeler"):
            dr.rasterize(context, pos, tri, (4, 4))
    assert torch.equal(rast, dr.rasterize(context, pos, tri, (4, 4))[0])


def test_contexts_and_modules_are_told_apart():
    """Projects ask which context they hold, which version they run with, and look into torch.ops."""
    import text3d_fast.compat.nvdiffrast as package

    assert not isinstance(dr.RasterizeGLContext(), dr.RasterizeCudaContext)
    assert not isinstance(dr.RasterizeCudaContext(), dr.RasterizeGLContext)
    assert package.__version__.startswith("0.3")
    assert dr.ops.rasterize is dr.rasterize and dr.ops.__name__ == "text3d_fast.compat.nvdiffrast.torch.ops"


def test_ranges_are_ignored_in_instanced_mode():
    pos = torch.tensor([[[-1.0, -1, 0, 1], [3, -1, 0, 1], [-1, 3, 0, 1]]])
    tri = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    ranges = torch.tensor([[0, 0]], dtype=torch.int32)
    context = dr.RasterizeCudaContext()
    rast, _ = dr.rasterize(context, pos, tri, (8, 8), ranges=ranges)
    assert rast[..., 3].eq(1).all()
    with dr.DepthPeeler(context, pos, tri, (8, 8), ranges=ranges) as peeler:
        assert torch.equal(peeler.rasterize_next_layer()[0], rast)
    assert dr.rasterize(context, pos[0], tri, (8, 8), ranges=ranges)[0].eq(0).all()


def test_background_of_an_environment_lookup_is_black():
    """Pixels that see nothing have the direction (0, 0, 0)."""
    cube = torch.rand(1, 6, 4, 4, 3, requires_grad=True)
    direction = torch.zeros(1, 1, 1, 3, requires_grad=True)
    out = dr.texture(cube, direction, filter_mode="linear", boundary_mode="cube")
    grads = torch.autograd.grad(out.sum(), (cube, direction))
    assert out.eq(0).all() and all(g.eq(0).all() for g in grads)


def test_attributes_of_corners_through_their_own_indices():
    """Per-face normals or UVs of their own: interpolate with another tri of as many triangles than was drawn."""
    pos = torch.tensor([[[-1.0, -1, 0, 1], [1, -1, 0, 1], [1, 1, 0, 1], [-1, 1, 0, 1]]])
    tri = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)
    rast, _ = dr.rasterize(dr.RasterizeCudaContext(), pos, tri, (4, 4))
    faces = torch.tensor([[0, 0, 0], [1, 1, 1]], dtype=torch.int32)
    attr = torch.tensor([[1.0], [2.0]], requires_grad=True)
    out, _ = dr.interpolate(attr[None], rast, faces)
    torch.testing.assert_close(out[..., 0], rast[..., 3])
    assert torch.autograd.grad(out.sum(), attr)[0].tolist() == [[float((rast[..., 3] == i).sum())] for i in (1, 2)]


def test_a_vertex_that_is_not_a_number_does_not_stop_the_rest():
    pos = torch.tensor([[[-1.0, -1, 0, 1], [3, -1, 0, 1], [-1, 3, 0, 1], [float("nan")] * 4]], requires_grad=True)
    tri = torch.tensor([[0, 1, 2], [0, 1, 3]], dtype=torch.int32)
    rast, _ = dr.rasterize(dr.RasterizeCudaContext(), pos, tri, (8, 8))
    color, _ = dr.interpolate(torch.ones(1, 4, 2), rast, tri)
    image = dr.antialias(color, rast, pos, tri)
    assert rast[..., 3].eq(1).all() and image.eq(1).all()
    assert torch.autograd.grad(rast[..., :2].sum() + image.sum(), pos)[0].isfinite().all()


def test_mip_gradients_reach_the_texture():
    tex = torch.rand(1, 8, 8, 3, requires_grad=True)
    uv, uv_da = torch.rand(1, 5, 5, 2), torch.full((1, 5, 5, 4), 0.3)
    direct = torch.autograd.grad(dr.texture(tex, uv, uv_da).sum(), tex)[0]
    prebuilt = torch.autograd.grad(dr.texture(tex, uv, uv_da, mip=dr.texture_construct_mip(tex)).sum(), tex)[0]
    torch.testing.assert_close(prebuilt, direct)


def test_cube_converges():
    import fit_cube

    errors, losses, _ = fit_cube.fit(steps=200)
    # 0.26 at the start; 400 steps reach 0.003
    assert errors[-1] < 0.2 * errors[0] and losses[-1] < 0.05 * losses[0]


def test_pose_converges():
    import fit_pose

    angles, losses, _ = fit_pose.fit(steps=80)
    assert angles[-1] < 2.0 and losses[-1] < 1e-3


def test_texture_converges():
    import recover_texture

    errors, losses, _ = recover_texture.fit(steps=60, size=32)
    # 60 steps reach 0.30 of the starting error, 300 reach 0.04
    assert errors[-1] < 0.35 * errors[0] and losses[-1] < 0.05 * losses[0]
