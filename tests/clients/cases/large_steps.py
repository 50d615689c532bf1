"""The renderer of "Large Steps in Inverse Rendering of Geometry": a lit sphere before an environment map."""

import importlib.util
import sys

import torch
from common import native_and_plain, sphere

spec = importlib.util.spec_from_file_location("render", sys.argv[1] + "/scripts/render.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
torch.manual_seed(0)
vertices, triangles = sphere()
vertices.requires_grad_()
view = torch.eye(4)
view[2, 3] = 4.0
scene = {"near_clip": 0.1, "far_clip": 100.0, "fov": 45.0, "res_x": 80, "res_y": 64, "view_mats": [view],
         "envmap": torch.rand(32, 64, 4), "envmap_scale": 1.0}
renderer = module.NVDRenderer(scene)
print(native_and_plain(lambda: renderer.render(vertices, torch.nn.functional.normalize(vertices, dim=-1), triangles),
                       [vertices]))
