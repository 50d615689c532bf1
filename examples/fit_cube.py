"""Fit a cube's vertex positions and colours from 16-pixel images, starting from a crumpled grey one.

    python examples/fit_cube.py --steps 400 --out fit_cube.png

Antialiased silhouettes are what pulls the corners into place. Prints the mean corner error before and after; the
picture shows target, result and convergence.
"""

import argparse

import torch
from common import cube, perspective, rotation, to_clip, translation, write_report

import text3d_fast.compat.nvdiffrast.torch as dr


def render(context, matrix, positions, colors, triangles, size):
    clip = to_clip(matrix, positions)
    rast, _ = dr.rasterize(context, clip, triangles, (size, size))
    image, _ = dr.interpolate(colors[None], rast, triangles)
    return dr.antialias(image, rast, clip, triangles)[0]


def fit(steps=400, size=16, seed=0):
    """-> corner error and loss of each step, and a large picture of target and result."""
    generator = torch.Generator().manual_seed(seed)
    context = dr.RasterizeCudaContext()
    target, triangles = cube()
    target_colors = (target + 1) / 2
    positions = (target + 0.6 * (torch.rand(8, 3, generator=generator) - 0.5)).requires_grad_()
    colors = torch.full((8, 3), 0.5).requires_grad_()
    optimizer = torch.optim.Adam([{"params": [positions], "lr": 1e-2}, {"params": [colors], "lr": 3e-2}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.05 ** (step / steps))
    camera = perspective() @ translation(0, 0, -6.5)
    errors, losses = [], []
    for _ in range(steps):
        matrix = camera @ rotation(torch.randn(4, generator=generator))
        with torch.no_grad():
            wanted = render(context, matrix, target, target_colors, triangles, size)
        loss = (render(context, matrix, positions, colors, triangles, size) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        errors.append((positions.detach() - target).norm(dim=1).mean().item())
    view = camera @ rotation(torch.tensor([0.9, 0.3, 0.4, 0.1]))
    with torch.no_grad():
        pictures = [render(context, view, p, c, triangles, 256) for p, c in
                    ((target, target_colors), (positions, colors))]
    return errors, losses, pictures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", default="fit_cube.png")
    options = parser.parse_args()
    errors, losses, pictures = fit(options.steps)
    write_report(options.out, pictures, {"corner error": errors, "loss": losses})
    print(f"mean corner error {errors[0]:.3f} -> {errors[-1]:.4f}; wrote {options.out}")
