"""Find a cube's orientation from one picture of it, its surface sampled from a cube map.

    python examples/fit_pose.py --steps 200 --out fit_pose.png

Several starts are refined a little, the best one to the end. Prints the angle to the true orientation in degrees.
"""

import argparse
import math

import torch
from common import cube, perspective, rotation, to_clip, translation, write_report

import text3d_fast.compat.nvdiffrast.torch as dr

FACE_COLORS = [[0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.2, 0.3, 0.9], [0.9, 0.8, 0.2], [0.8, 0.3, 0.8], [0.3, 0.8, 0.8]]


def cube_map(size=32) -> torch.Tensor:
    """Six colours, each with a soft gradient, so that the picture changes smoothly with the pose: [1, 6, N, N, 3]."""
    faces = torch.tensor(FACE_COLORS)[:, None, None].expand(6, size, size, 3)
    ramp = torch.linspace(0.4, 1.0, size)
    return (faces * ramp[None, :, None, None] * ramp[None, None, :, None])[None].contiguous()


def render(context, pose, texture, size=64):
    positions, triangles = cube()
    clip = to_clip(perspective() @ translation(0, 0, -6.5) @ rotation(pose), positions)
    rast, _ = dr.rasterize(context, clip, triangles, (size, size))
    direction, _ = dr.interpolate(positions[None], rast, triangles)
    seen = rast[..., 3:] > 0
    direction = torch.where(seen, direction, torch.ones_like(direction))  # the background samples anywhere
    image = dr.texture(texture, direction, filter_mode="linear", boundary_mode="cube") * seen
    return dr.antialias(image, rast, clip, triangles)[0]


def angle_between(a, b) -> float:
    """Degrees between two orientations; by the chord, as the arc cosine of nearly 1 has no digits."""
    a, b = (torch.nn.functional.normalize(q.double(), dim=0) for q in (a, b))
    chord = min((a - b).norm().item(), (a + b).norm().item())
    return math.degrees(4 * math.asin(min(chord / 2, 1.0)))


def refine(context, pose, wanted, texture, steps, rate):
    pose = pose.clone().requires_grad_()
    optimizer = torch.optim.Adam([pose], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.01 ** (step / steps))
    losses, poses = [], []
    for _ in range(steps):
        loss = (render(context, pose, texture) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        poses.append(pose.detach().clone())
        optimizer.step()
        schedule.step()
    return losses, poses


def fit(steps=200, starts=24, seed=0):
    """-> angle (degrees) and loss of each step, and pictures of target, start and result."""
    generator = torch.Generator().manual_seed(seed)
    context, texture = dr.RasterizeCudaContext(), cube_map()
    true = torch.randn(4, generator=generator)
    wanted = render(context, true, texture)
    tried = [refine(context, torch.randn(4, generator=generator), wanted, texture, 20, 0.1) for _ in range(starts)]
    losses, poses = min(tried, key=lambda run: run[0][-1])
    more_losses, more_poses = refine(context, poses[-1], wanted, texture, steps, 0.03)
    angles = [angle_between(p, true) for p in poses + more_poses]
    pictures = [wanted, render(context, poses[0], texture), render(context, more_poses[-1], texture)]
    return angles, losses + more_losses, pictures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="fit_pose.png")
    options = parser.parse_args()
    angles, losses, pictures = fit(options.steps)
    write_report(options.out, pictures, {"degrees": angles, "loss": losses})
    print(f"angle to the true pose {angles[0]:.1f} -> {angles[-1]:.3f} degrees; wrote {options.out}")
