"""threestudio's NeRFVolumeRenderer, as dreamfusion-sd uses it, and its importance estimator."""

import sys

import torch
from common import Ball, camera, dense_picture, largest
from threestudio_stand_ins import load

(module,) = load(sys.argv[1], "models.renderers.nerf_volume_renderer")


class Geometry(Ball):
    def forward_density(self, x):
        return self.query_density(x)

    def forward(self, x, output_normal=False):
        return {"density": self.query_density(x), "features": torch.sigmoid(4 * x)}


class Material:
    requires_normal = False

    def __call__(self, features, **_):
        return features


torch.manual_seed(0)
geometry = Geometry()
white = lambda dirs: torch.ones_like(dirs)
figures = []
for estimator in ("occgrid", "importance"):
    config = {"radius": 1.0, "estimator": estimator, "num_samples_per_ray": 256, "randomized": False,
              "near_plane": 0.0 if estimator == "occgrid" else 1.0, "far_plane": 1e10 if estimator == "occgrid" else 5.0}
    renderer = module.NeRFVolumeRenderer(config, geometry, Material(), white)
    renderer.train()
    for step in range(0, 64, 16):
        renderer.update_step(0, step)
    origins, directions = camera(64)
    rays = [x.view(1, 64, 64, 3) for x in (origins, directions)]
    out = renderer(*rays, light_positions=torch.zeros(1, 3))
    fine = 1.732 * 2 / 256
    expected, opacity = dense_picture(Ball.forward.__get__(geometry), origins, directions, 0.0, 6.0, fine)
    gradient = torch.autograd.grad(out["comp_rgb"].sum(), geometry.sharpness)[0]
    wanted = torch.autograd.grad(expected.sum(), geometry.sharpness)[0]
    picture, relative = largest(out["comp_rgb"].view(-1, 3), expected), float((gradient / wanted - 1).abs())
    limit = 0.02 if estimator == "occgrid" else 0.1  # alpha_thre 0.01 leaves thin samples out; other lattices differ
    assert picture < limit and largest(out["opacity"].view(-1, 1), opacity) < limit and relative < 0.2, (picture, relative)
    assert out["z_variance"].isfinite().all()
    figures.append(f"{estimator} {len(out['weights'])} samples, picture {picture:.1e}, gradient {relative:.1e}")
print("64 x 64 ball against plain torch: " + "; ".join(figures))
