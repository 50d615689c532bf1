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
# name: configuration, camera distance and spread
CASES = {
    "occupancy grid": ({"radius": 1.0, "estimator": "occgrid", "num_samples_per_ray": 256,
                        "prune_alpha_threshold": False}, 3.0, 0.35),
    "dreamfusion-sd, pruned": ({"radius": 2.0, "estimator": "occgrid", "num_samples_per_ray": 512,
                                "prune_alpha_threshold": True}, 1.75, 0.55),  # as its configuration says
    "importance": ({"radius": 1.0, "estimator": "importance", "num_samples_per_ray": 256, "near_plane": 1.0,
                    "far_plane": 5.0}, 3.0, 0.35),
}
figures = []
for name, (config, distance, spread) in CASES.items():
    renderer = module.NeRFVolumeRenderer({"randomized": False, **config}, geometry, Material(), white)
    renderer.train()
    for step in range(0, 64, 16):
        renderer.update_step(0, step)
    origins, directions = camera(64, distance, spread)
    rays = [x.view(1, 64, 64, 3) for x in (origins, directions)]
    out = renderer(*rays, light_positions=torch.zeros(1, 3))
    fine = 1.732 * 2 * config["radius"] / config["num_samples_per_ray"]
    grid = renderer.estimator if config["estimator"] == "occgrid" else None
    thinnest = min(0.01, float(grid.occs.mean())) if config.get("prune_alpha_threshold") else None
    field = lambda x: Ball.forward(geometry, x)
    expected, _ = dense_picture(field, origins, directions, 0.0, 6.0, fine, grid, thinnest)
    gradient = torch.autograd.grad(out["comp_rgb"].sum(), geometry.density)[0]
    wanted = torch.autograd.grad(expected.sum(), geometry.density)[0]
    difference = (out["comp_rgb"].view(-1, 3) - expected).abs()
    # Importance samples lie elsewhere: two quadratures of one integral, compared on average.
    picture = float(difference.max() if grid is not None else difference.mean())
    relative = float((gradient / wanted - 1).abs())
    assert picture < 5e-3 and relative < (0.02 if grid is not None else 0.2), (name, picture, relative)
    assert out["z_variance"].isfinite().all()
    figures.append(f"{name} {len(out['weights'])} samples, picture {picture:.1e}, gradient {relative:.1e}")
print("64 x 64 ball against plain torch: " + "; ".join(figures) + " (the latter on average)")
