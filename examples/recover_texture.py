"""Recover a texture from pictures of a tilted plane at random distances, through mipmaps.

    python examples/recover_texture.py --steps 300 --out recover_texture.png

Far views touch coarse levels, near ones the texture itself; the gradients of all levels meet in the one texture.
Prints the texture's error before and after.
"""

import argparse

import torch
from common import perspective, rotation, to_clip, translation, write_report

import text3d_fast.compat.nvdiffrast.torch as dr

PLANE = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
UV = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])
TRIANGLES = torch.tensor([[0, 1, 2], [0, 2, 3]], dtype=torch.int32)


def pattern(size=64) -> torch.Tensor:
    """Rings in colour: detail at every scale. [1, N, N, 3]"""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    radius = (x**2 + y**2).sqrt()
    return torch.stack([0.5 + 0.5 * torch.sin(18 * radius), 0.5 + 0.5 * x * torch.cos(9 * y), 0.5 + 0.5 * y], -1)[None]


def render(context, matrix, texture, size):
    clip = to_clip(matrix, PLANE)
    rast, rast_db = dr.rasterize(context, clip, TRIANGLES, (size, size))
    uv, uv_da = dr.interpolate(UV[None], rast, TRIANGLES, rast_db=rast_db, diff_attrs="all")
    color = dr.texture(texture, uv, uv_da, filter_mode="linear-mipmap-linear", boundary_mode="clamp")
    return (color * (rast[..., 3:] > 0))[0]


def fit(steps=300, size=48, seed=0):
    """-> texture error and loss of each step, and pictures: true and recovered texture."""
    generator = torch.Generator().manual_seed(seed)
    context, true = dr.RasterizeCudaContext(), pattern()
    texture = torch.full_like(true, 0.5).requires_grad_()
    optimizer = torch.optim.Adam([texture], lr=3e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 ** (step / steps))
    errors, losses = [], []
    for _ in range(steps):
        turn = torch.cat([torch.ones(1), 0.25 * torch.randn(3, generator=generator)])
        distance = 2.0 + 4.0 * torch.rand(1, generator=generator).item() ** 2
        matrix = perspective() @ translation(0, 0, -distance) @ rotation(turn)
        with torch.no_grad():
            wanted = render(context, matrix, true, size)
        loss = (render(context, matrix, texture, size) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        errors.append((texture.detach() - true).square().mean().sqrt().item())
    return errors, losses, [true[0], texture.detach()[0]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", default="recover_texture.png")
    options = parser.parse_args()
    errors, losses, pictures = fit(options.steps)
    write_report(options.out, pictures, {"texture RMSE": errors, "loss": losses})
    print(f"texture RMSE {errors[0]:.3f} -> {errors[-1]:.4f}; wrote {options.out}")
