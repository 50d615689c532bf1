"""threestudio's NVDiffRasterizerContext: normals and mask of a sphere, with gradients to the vertices."""

import sys

import torch
from common import native_and_plain, sphere
from threestudio_stand_ins import load

(module,) = load(sys.argv[1], "utils.rasterize")
context = module.NVDiffRasterizerContext("cuda", torch.device("cuda"))
vertices, triangles = sphere()
vertices.requires_grad_()
projection = torch.tensor([[2.0, 0, 0, 0], [0, -2, 0, 0], [0, 0, -1.2, 2.8], [0, 0, -1, 4]])[None]


def render():
    clip = context.vertex_transform(vertices, projection)
    rast, _ = context.rasterize(clip, triangles, (96, 96))
    normals, _ = context.interpolate_one(torch.nn.functional.normalize(vertices, dim=-1), rast, triangles)
    picture = torch.where(rast[..., 3:] > 0, 0.5 + 0.5 * normals, 0.0)
    return context.antialias(picture, rast, clip, triangles)


print(native_and_plain(render, [vertices]))
