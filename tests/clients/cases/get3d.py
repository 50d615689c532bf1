"""GET3D's NeuralRender: features and mask of a mesh by its depth peeler, antialiased."""

import sys

import torch

sys.path.insert(0, sys.argv[1])
from common import native_and_plain, sphere
from uni_rep.camera.perspective_camera import PerspectiveCamera
from uni_rep.render.neural_render import NeuralRender

renderer = NeuralRender(device="cuda", camera_model=PerspectiveCamera(fovy=49.0, device="cuda"))
vertices, triangles = sphere()
vertices.requires_grad_()
view = torch.eye(4)[None]
view[:, 2, 3] = -3.5


def render():
    feature, mask, *_, depth = renderer.render_mesh(vertices[None], triangles, view, vertices[None], resolution=80)
    return torch.cat([feature, mask, 0.1 * depth], -1)


print(native_and_plain(render, [vertices]))
