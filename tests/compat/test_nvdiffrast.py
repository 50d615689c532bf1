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
    assert out.strip() == "text3d_fast.compat.nvdiffrast.torch"


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
