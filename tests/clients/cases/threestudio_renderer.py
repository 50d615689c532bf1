"""threestudio's NeRFVolumeRenderer, as dreamfusion-sd uses it, and its importance estimator."""

import sys

import torch
from common import Ball, camera, dense_picture
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
for estimator, near, far in (("occgrid", 0.0, 1e10), ("importance", 1.0, 5.0)):
    config = {"radius": 1.0, "estimator": estimator, "num_samples_per_ray": 256, "randomized": False,
              "prune_alpha_threshold": False, "near_plane": near, "far_plane": far}
    renderer = module.NeRFVolumeRenderer(config, geometry, Material(), white)
    renderer.train()
    for step in range(0, 64, 16):
        renderer.update_step(0, step)
    origins, directions = camera(64)
    rays = [x.view(1, 64, 64, 3) for x in (origins, directions)]
    out = renderer(*rays, light_positions=torch.zeros(1, 3))
    fine = 1.732 * 2 / 256
    grid = renderer.estimator if estimator == "occgrid" else None
    expected, _ = dense_picture(lambda x: Ball.forward(geometry, x), origins, directions, 0.0, 6.0, fine, grid)
    gradient = torch.autograd.grad(out["comp_rgb"].sum(), geometry.density)[0]
    wanted = torch.autograd.grad(expected.sum(), geometry.density)[0]
    difference = (out["comp_rgb"].view(-1, 3) - expected).abs()
    # Importance samples lie elsewhere: two quadratures of one integral, compared on average.
    picture = float(difference.max() if grid is not None else difference.mean())
    relative = float((gradient / wanted - 1).abs())
    assert picture < 5e-3 and relative < (0.02 if grid is not None else 0.2), (estimator, picture, relative)
    assert out["z_variance"].isfinite().all()
    figures.append(f"{estimator} {len(out['weights'])} samples, picture {picture:.1e}, gradient {relative:.1e}")
print("64 x 64 ball against plain torch: " + "; ".join(figures) + " (the latter on average)")
