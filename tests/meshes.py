"""Meshes and cameras shared by the rasterization tests and benchmarks."""

import math

import torch


def uv_sphere(triangles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vertices float32 [V, 3] on the unit sphere and about that many triangles int32 [F, 3]."""
    rows = max(2, int(math.sqrt(triangles / 4)))
    columns = 2 * rows
    polar, azimuth = torch.meshgrid(
        torch.linspace(0, math.pi, rows + 1), torch.linspace(0, 2 * math.pi, columns + 1), indexing="ij"
    )
    vertices = torch.stack([polar.sin() * azimuth.cos(), polar.cos(), polar.sin() * azimuth.sin()], -1).view(-1, 3)
    a = torch.arange(rows)[:, None] * (columns + 1) + torch.arange(columns)
    b, c, d = a + 1, a + columns + 1, a + columns + 2
    faces = torch.cat([torch.stack([a, c, b], -1).view(-1, 3), torch.stack([b, c, d], -1).view(-1, 3)])
    return vertices, faces.int()


def perspective(vertices: torch.Tensor, distance: float = 3.2, near: float = 1.0, far: float = 10.0) -> torch.Tensor:
    """Clip-space positions [..., V, 4] seen along -z from (0, 0, distance), field of view 40 degrees."""
    scale = 1 / math.tan(math.radians(20))
    z = vertices[..., 2] - distance
    depth = (-(far + near) * z - 2 * far * near) / (far - near)
    return torch.stack([vertices[..., 0] * scale, vertices[..., 1] * scale, depth, -z], -1)


def soup(triangles: int, size: float, generator: torch.Generator, device="cpu", batch: int = 2):
    """Random separate triangles of about this size in front of the camera: pos [B, 3F, 4], tri [F, 3]."""
    shape = (batch, triangles, 3, 4)
    centres = torch.randn(batch, triangles, 1, 4, generator=generator, device=device) * 0.7
    pos = centres + size * torch.randn(shape, generator=generator, device=device)
    pos[..., 3] = pos[..., 3].abs() + 0.5
    pos[..., 2].clamp_(-0.4, 0.4)
    tri = torch.arange(3 * triangles, dtype=torch.int32, device=device).view(-1, 3)
    return pos.reshape(batch, -1, 4), tri
