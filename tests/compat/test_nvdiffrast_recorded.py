"""The drop-in against outputs and gradients that nvdiffrast itself gave on CUDA, where the recording is at hand."""

import os
from pathlib import Path

import pytest
import torch

import text3d_fast.compat.nvdiffrast.torch as dr

FIXTURES = Path(os.environ.get("TEXT3D_FIXTURES", Path(__file__).resolve().parents[3] / "shared" / "fixtures"))
RECORDING = FIXTURES / "nvdiffrast_golden.safetensors"
pytestmark = pytest.mark.skipif(not RECORDING.is_file(), reason=f"{RECORDING} is absent (TEXT3D_FIXTURES)")

POS = [[-0.7, 0.8, 0, 1], [0.8, 0.7, 0.1, 1], [0.7, -0.8, 0.2, 1], [-0.8, -0.7, 0, 1]]
ATTR = [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
UV = [[0.10, 0.10], [0.85, 0.20], [0.90, 0.85], [0.20, 0.90]]


class Scene:
    def __init__(self, device):
        load = pytest.importorskip("safetensors.torch").load_file
        self.recorded = {name: value.to(device) for name, value in load(RECORDING).items()}
        tensor = lambda values: torch.tensor([values], device=device, requires_grad=True)
        self.pos, self.attr, self.uvs = tensor(POS), tensor(ATTR), tensor(UV)
        self.tri = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32, device=device)
        self.rast, self.rast_db = dr.rasterize(dr.RasterizeCudaContext(), self.pos, self.tri, (16, 16))
        y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        self.tex = torch.stack([x / 7, y / 7, (x + y) / 14], -1)[None].to(device).requires_grad_()

    def check(self, tolerance=1e-5, **got):
        for name, value in got.items():
            want = self.recorded[name]
            scale = max(1.0, want.abs().max().item())  # float32 on two machines: relative to the largest number
            torch.testing.assert_close(value / scale, want / scale, rtol=0, atol=tolerance)


@pytest.fixture
def scene(device):
    return Scene(device)


def test_rasterize(scene):
    scene.check(rast=scene.rast, rast_db=scene.rast_db)
    cotangents = scene.recorded["co_rast"], scene.recorded["co_rast_db"]
    scene.check(d_pos_from_rast=torch.autograd.grad((scene.rast, scene.rast_db), scene.pos, cotangents)[0])


def test_interpolate(scene):
    rast, rast_db = scene.rast.detach().requires_grad_(), scene.rast_db.detach().requires_grad_()
    out, out_da = dr.interpolate(scene.attr, rast, scene.tri, rast_db, diff_attrs="all")
    cotangents = scene.recorded["co_interp_out"], scene.recorded["co_interp_out_da"]
    grads = torch.autograd.grad((out, out_da), (scene.attr, rast, rast_db), cotangents)
    scene.check(interp_out=out, interp_out_da=out_da, d_attr_from_interp=grads[0], d_rast_from_interp=grads[1],
                d_rast_db_from_interp=grads[2])


def test_texture(scene):
    uv, uv_da = dr.interpolate(scene.uvs, scene.rast, scene.tri, scene.rast_db, diff_attrs="all")
    scene.check(uv=uv, uv_da=uv_da)
    uv, uv_da = (scene.recorded[name].clone().requires_grad_() for name in ("uv", "uv_da"))
    bilinear = dr.texture(scene.tex, uv, filter_mode="linear", boundary_mode="clamp")
    grads = torch.autograd.grad(bilinear, (scene.tex, uv), scene.recorded["co_tex"])
    scene.check(tex_bilinear=bilinear, d_tex_from_bilinear=grads[0], d_uv_from_bilinear=grads[1])
    trilinear = dr.texture(scene.tex, uv, uv_da, filter_mode="linear-mipmap-linear", boundary_mode="clamp")
    grads = torch.autograd.grad(trilinear, (scene.tex, uv, uv_da), scene.recorded["co_tex"])
    scene.check(tex_trilinear=trilinear, d_tex_from_trilinear=grads[0], d_uv_from_trilinear=grads[1],
                d_uvDA_from_trilinear=grads[2])


def test_antialias(scene):
    color = torch.full((1, 16, 16, 3), 0.7, device=scene.pos.device, requires_grad=True)
    out = dr.antialias(color, scene.recorded["rast"], scene.pos, scene.tri)
    grads = torch.autograd.grad(out, (color, scene.pos), scene.recorded["co_antialias"])
    scene.check(antialias_out=out, d_color_from_antialias=grads[0], d_pos_from_antialias=grads[1])
