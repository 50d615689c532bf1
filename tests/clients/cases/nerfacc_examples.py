"""nerfacc's examples/utils.py: pictures through occupancy grid (training and test renderers) and proposals."""

import sys

import torch

sys.path.insert(0, sys.argv[1] + "/examples")
from common import Ball, camera, dense_picture, largest
from datasets.utils import Rays
from nerfacc import OccGridEstimator, PropNetEstimator
from utils import render_image_with_occgrid, render_image_with_occgrid_test, render_image_with_propnet

torch.manual_seed(0)
field = Ball()
origins, directions = camera(48)
rays = Rays(origins.view(48, 48, 3), directions.view(48, 48, 3))
estimator = OccGridEstimator([-1.0, -1, -1, 1, 1, 1], resolution=32, levels=2)
for step in range(0, 64, 16):
    estimator.update_every_n_steps(step, lambda x: field.query_density(x) * 0.01)
step, white = 0.01, torch.ones(3)
expected, _ = dense_picture(field, origins, directions, 0.0, 6.0, step, estimator)

field.eval()
estimator.eval()
options = {"render_step_size": step, "render_bkgd": white}
colours, opacity, depth, samples = render_image_with_occgrid(field, estimator, rays, **options)
gradient = torch.autograd.grad(colours.sum(), field.density)[0]
wanted = torch.autograd.grad(expected.sum(), field.density)[0]
by_parts, *_, parts = render_image_with_occgrid_test(1024, field, estimator, rays, **options)
propnet = PropNetEstimator()
proposed, *_ = render_image_with_propnet(field, [field.query_density], propnet, rays, 256, [128], 0.5, 5.0, "uniform",
                                         opaque_bkgd=False, render_bkgd=white)  # fmt: skip
everywhere, _ = dense_picture(field, origins, directions, 0.0, 6.0, step)
differences = [largest(x.view(-1, 3), expected) for x in (colours, by_parts)]
differences.append(largest(proposed.view(-1, 3), everywhere))  # other intervals of the same integral
relative = float((gradient / wanted - 1).abs())
# The gradient is that of an opaque ball's density: small, and it misses what lies behind the early stop.
assert max(differences[:2]) < 5e-3 and differences[2] < 0.05 and relative < 0.1, (differences, relative)
assert samples < 48 * 48 * 600 / 4
print(f"48 x 48 ball against all {48 * 48 * 600} intervals in plain torch: occupancy grid {differences[0]:.1e} "
      f"({samples} samples), in portions {differences[1]:.1e}, proposals {differences[2]:.1e}; gradient {relative:.1e}")
