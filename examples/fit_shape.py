"""Fit a mesh to pictures: a ball on a deformable tetrahedral grid (DMTet) becomes a torus, hole and colours included.

    python examples/fit_shape.py --steps 200 --out fit_shape.glb
"""

import argparse

import torch

from text3d_fast import nn, ops
from text3d_fast.geometry import Mesh, write_mesh
from text3d_fast.scene import Cameras, ColorField, laplacian_loss, sdf_sign_loss
from text3d_fast.scene.mesh_renderer import render_meshes


def torus(points):  # a signed distance, positive inside
    return 0.2 - torch.stack([points[:, [0, 2]].norm(dim=1) - 0.45, points[:, 1]]).norm(dim=0)


def fit(steps=200, resolution=32, size=96, seed=0):
    """-> the fitted Mesh, and the silhouettes' loss of each step."""
    generator = torch.Generator().manual_seed(seed)
    grid, truth = nn.DeformableTetGrid(resolution), nn.DeformableTetGrid(64).requires_grad_(False)
    truth.sdf.copy_(torus(truth.rest_positions()))
    grid.sdf.data.copy_((0.5 - grid.rest_positions().norm(dim=1)).clamp(-0.05, 0.05))  # cut: quick to change inside
    color = ColorField(ops.HashGridSpec(levels=4, log2_table_size=12, base_resolution=4))
    optimizer = torch.optim.Adam([{"params": [grid.sdf], "lr": 1e-2}, {"params": [grid.deformation], "lr": 5e-2},
                                  {"params": color.parameters(), "lr": 2e-2}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.05 ** (step / steps))
    background, losses = torch.ones(2, 3), []
    for _ in range(steps):
        view = torch.rand(2, 2, generator=generator)
        camera = Cameras.orbit(2.4 * view[0] - 1.2, 6.3 * view[1], 2.5, 0.7, size)
        wanted = render_meshes([Mesh(*truth.mesh())], camera, background, mode="albedo", material=lambda x: x + 0.5)
        mesh = Mesh(*grid.mesh())
        seen = render_meshes([mesh], camera, background, mode="albedo", material=color)
        silhouettes = (seen.mask - wanted.mask).square().mean()
        loss = silhouettes + (seen.color - wanted.color).square().mean()
        loss = loss + 1e-2 * laplacian_loss(mesh.vertices, mesh.faces, grid.spacing)
        loss = loss + 1e-2 * sdf_sign_loss(grid.sdf / grid.spacing, grid.crossing_edges())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(silhouettes.item())
    vertices, faces = (x.detach() for x in grid.mesh())
    return Mesh(vertices, faces, colors=color(vertices).detach()), losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="fit_shape.glb")
    options = parser.parse_args()
    mesh, losses = fit(options.steps)
    write_mesh(options.out, mesh.with_normals())
    off = torus(mesh.vertices).abs().mean()
    print(f"silhouettes {losses[0]:.4f} -> {losses[-1]:.5f}; Euler characteristic {mesh.euler_characteristic()} "
          f"(of a torus: 0); mean distance from the true surface {off:.4f}; wrote {options.out}")
