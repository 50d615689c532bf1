"""nerfstudio's RGB, accumulation and depth renderers on packed samples."""

import sys

import torch

sys.path.insert(0, sys.argv[1])
from common import Ball, camera, dense_picture, largest
from nerfacc import OccGridEstimator, render_weight_from_density
from nerfstudio.cameras.rays import Frustums, RaySamples
from nerfstudio.model_components.renderers import AccumulationRenderer, DepthRenderer, RGBRenderer

torch.manual_seed(0)
field = Ball()
origins, directions = camera(48)
estimator = OccGridEstimator([-1.0, -1, -1, 1, 1, 1], resolution=32)
estimator.update_every_n_steps(0, lambda x: field.query_density(x) * 0.01)
rays, starts, ends = estimator.sampling(origins, directions, render_step_size=0.01)
frustums = Frustums(origins[rays], directions[rays], starts[:, None], ends[:, None], torch.ones(len(rays), 1))
samples = RaySamples(frustums)
rgb, sigma = field(frustums.get_positions())
packed = {"ray_indices": rays, "num_rays": len(origins)}
weights = render_weight_from_density(starts, ends, sigma[:, 0], ray_indices=rays, n_rays=len(origins))[0][:, None]
colours = RGBRenderer("white")(rgb=rgb, weights=weights, **packed)
opacity = AccumulationRenderer()(weights, **packed)
depth = DepthRenderer("expected")(weights, samples, **packed)
expected, dense_opacity = dense_picture(field, origins, directions, 0.0, 6.0, 0.01, estimator)
difference = max(largest(colours, expected), largest(opacity, dense_opacity))
middle = depth.view(48, 48)[23:25, 23:25].mean().item()
assert difference < 5e-3 and 2.2 < middle < 2.4, (difference, middle)
print(f"48 x 48 ball against plain torch: colours and opacity {difference:.1e}; depth in the middle {middle:.3f}")
