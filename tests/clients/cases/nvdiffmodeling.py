"""nvdiffmodeling's renderer: a textured sphere, two peeled layers, PBR shading; gradients to vertices and texture.

Its renderutils are a CUDA extension with a Python twin of every function (`use_python=True`); the twins are used."""

import functools
import sys
from types import ModuleType

import torch
import torch.utils.cpp_extension
from common import native_and_plain, sphere

sys.path.insert(0, sys.argv[1])
sys.modules["renderutils_plugin"] = ModuleType("renderutils_plugin")
torch.utils.cpp_extension.load = lambda **_: None
from src import mesh, render, texture  # noqa: E402
from src import renderutils as ru  # noqa: E402

for name in ("prepare_shading_normal", "pbr_bsdf", "lambert", "xfm_points", "xfm_vectors"):
    setattr(ru, name, functools.partial(getattr(ru, name), use_python=True))
import nvdiffrast.torch as dr  # noqa: E402

torch.manual_seed(0)
vertices, triangles = sphere()
vertices.requires_grad_()
uv = torch.stack([torch.atan2(vertices[:, 2], vertices[:, 0]) / 6.3 + 0.5, vertices[:, 1] / 2 + 0.5], -1).detach()
albedo = torch.rand(1, 64, 64, 4).requires_grad_()
clip = torch.tensor([[[2.0, 0, 0, 0], [0, -2, 0, 0], [0, 0, -1.2, 2.8], [0, 0, -1, 4]]])
eye = torch.tensor([[0.0, 0, 4]])


def scene():
    material = {"bsdf": "pbr", "kd": texture.Texture2D(albedo), "ks": texture.Texture2D(torch.full((1, 4, 4, 3), 0.4))}
    shape = mesh.Mesh(vertices, triangles.long(), v_tex=uv, t_tex_idx=triangles.long(), material=material)
    return mesh.compute_tangents(mesh.auto_normals(shape)).eval()


context = dr.RasterizeCudaContext()
print(native_and_plain(
    lambda: render.render_mesh(context, scene(), clip, eye, 2 * eye, torch.full((1, 3), 8.0), 64, num_layers=2),
    [vertices, albedo],
))  # fmt: skip
