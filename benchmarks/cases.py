"""Each op as one callable on made-up data, large enough to fill a GPU or small enough for a sanitizer or a CPU.

A case says how many bytes a call must move at least: each input read once, each output written once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from text3d_fast import nn, ops
from text3d_fast.ops.tet_grid import TetGrid


@dataclass
class Case:
    """run() returns tensors to compare with the reference's; capturable: no synchronization, so a graph can hold it."""

    name: str
    run: Callable[[], list[torch.Tensor]]
    bytes: int
    capturable: bool = True


def size_of(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _with_gradient(name: str, leaves: list[torch.Tensor], forward: Callable, others: int = 0, capturable: bool = True):
    """Two cases: forward alone, and with the gradient to the leaves from fixed cotangents."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with torch.no_grad():
        outputs = forward()
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, device=o.device) for o in outputs]

    def value():
        with torch.no_grad():
            return forward()

    def gradient():
        return list(torch.autograd.grad(forward(), leaves, cotangents))

    read = size_of(*leaves) + others
    yield Case(name, value, read + size_of(*outputs), capturable)
    yield Case(f"{name} + gradient", gradient, 2 * read + 3 * size_of(*outputs) + size_of(*leaves), capturable)


def hash_grid(device, small: bool) -> Iterator[Case]:
    spec = ops.HashGridSpec(levels=4 if small else 16, log2_table_size=10 if small else 19, per_level_scale=1.45)
    x = torch.rand(777 if small else 2**20, 3, device=device)
    params = torch.rand(spec.num_params, device=device)
    yield from _with_gradient("hash_grid", [params], lambda: [ops.hash_grid(x, params, spec)], size_of(x))


def mlp(device, small: bool) -> Iterator[Case]:
    spec = ops.MLPSpec(32, 4)
    x = torch.randn(777 if small else 2**20, 32, device=device)
    weights = torch.randn(spec.num_params, device=device) / 8
    yield from _with_gradient("mlp", [x, weights], lambda: [ops.mlp(x, weights, spec)])


def _rays(device, small: bool):
    side = 9 if small else 256
    axis = torch.linspace(-0.36, 0.36, side, device=device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    directions = torch.nn.functional.normalize(torch.stack([x, y, -torch.ones_like(x)], -1).view(-1, 3), dim=-1)
    origins = torch.tensor([0.013, 0.021, 1.75], device=device).expand(side * side, 3).contiguous()
    grid = nn.OccupancyGrid([-1.0] * 3 + [1.0] * 3, 16 if small else 128).to(device)
    grid.update(0, lambda p: ((p.norm(dim=-1) - 0.7).abs() < 0.15).float(), torch.Generator(device).manual_seed(0))
    return origins, directions, grid, 0.0517 if small else 1.732 * 2 / 512


def march_rays(device, small: bool) -> Iterator[Case]:
    origins, directions, grid, step = _rays(device, small)
    room = ops.march_rays(origins, directions, grid, step=step).num_samples + 100

    def run():
        samples = ops.march_rays(origins, directions, grid, step=step, capacity=room)
        return [samples.ray_offsets, samples.t_starts, samples.t_ends]

    moved = size_of(origins, directions) + grid.binaries.numel() // 8 + 12 * room + 4 * len(origins)
    yield Case("march_rays", run, moved)


def composite(device, small: bool) -> Iterator[Case]:
    origins, directions, grid, step = _rays(device, small)
    samples = ops.march_rays(origins, directions, grid, step=step)
    sigma, values = torch.rand(samples.num_samples, device=device), torch.rand(samples.num_samples, 3, device=device)

    def run():
        out = ops.composite(sigma, values, samples)
        return [out.values, out.opacity, out.depth]

    others = size_of(samples.t_starts, samples.t_ends, samples.ray_offsets)
    yield from _with_gradient("composite", [sigma, values], run, others)


def segmented_scan(device, small: bool) -> Iterator[Case]:
    origins, directions, grid, step = _rays(device, small)
    offsets = ops.march_rays(origins, directions, grid, step=step).ray_offsets
    values = 0.9 + 0.1 * torch.rand(int(offsets[-1]), device=device)
    run = lambda: [ops.segmented_scan(values, offsets, "product", exclusive=True)]
    yield from _with_gradient("segmented_scan", [values], run, size_of(offsets))


def _sphere(device, small: bool):
    """pos [B, V, 4], tri [F, 3], resolution."""
    rows, columns, batch, side = (7, 9, 2, 33) if small else (200, 400, 4, 512)
    theta = torch.linspace(0.05, 3.09, rows, device=device)[:, None]
    phi = torch.linspace(0, 6.2832, columns + 1, device=device)[None, :-1]
    xyz = torch.stack([theta.sin() * phi.cos(), theta.cos() + 0 * phi, theta.sin() * phi.sin()], -1).view(-1, 3)
    corner = (torch.arange(rows - 1, device=device)[:, None] * columns + torch.arange(columns, device=device)).view(-1)
    right = torch.where(corner % columns == columns - 1, corner + 1 - columns, corner + 1)
    tri = torch.cat([torch.stack([corner, right, corner + columns], -1),
                     torch.stack([right, right + columns, corner + columns], -1)]).int()
    scale = torch.linspace(0.6, 0.9, batch, device=device)[:, None, None]
    flat = torch.tensor([1.0, 1.0, 0.5], device=device)
    pos = torch.nn.functional.pad(xyz * scale * flat, (0, 1), value=1.0)
    return pos.contiguous(), tri, (side, side)


def rasterize(device, small: bool) -> Iterator[Case]:
    pos, tri, size = _sphere(device, small)
    yield from _with_gradient("rasterize", [pos], lambda: list(ops.rasterize(pos, tri, size)), size_of(tri))


def interpolate(device, small: bool) -> Iterator[Case]:
    pos, tri, size = _sphere(device, small)
    rast, rast_db = ops.rasterize(pos, tri, size)
    attr = torch.rand(*pos.shape[:2], 4, device=device)

    def run():
        return list(ops.interpolate(attr, rast, tri, rast_db, "all"))

    yield from _with_gradient("interpolate", [attr, rast], run, size_of(tri, rast_db))


def texture(device, small: bool) -> Iterator[Case]:
    side, pixels = (16, 21) if small else (1024, 512)
    tex = torch.rand(1, side, side, 3, device=device)
    uv = torch.rand(2, pixels, pixels, 2, device=device)
    uv_da = torch.randn(2, pixels, pixels, 4, device=device) / pixels
    run = lambda: [ops.texture(tex, uv, uv_da)]
    yield from _with_gradient("texture", [tex, uv], run, size_of(uv_da))


def antialias(device, small: bool) -> Iterator[Case]:
    pos, tri, size = _sphere(device, small)
    rast, _ = ops.rasterize(pos, tri, size)
    color, topology = torch.rand(*rast.shape[:3], 3, device=device), ops.antialias_topology(tri)
    run = lambda: [ops.antialias(color, rast, pos, tri, topology)]
    yield from _with_gradient("antialias", [color, pos], run, size_of(rast, tri, topology))


def marching_tets(device, small: bool) -> Iterator[Case]:
    grid = TetGrid.kuhn(6 if small else 128, device=device)
    sdf = 0.7 - grid.positions.norm(dim=-1)
    run = lambda: [ops.marching_tets(grid.positions, sdf, grid)[0]]
    yield from _with_gradient("marching_tets", [sdf], run, 0, False)


ALL = (hash_grid, mlp, march_rays, composite, segmented_scan, rasterize, interpolate, texture, antialias, marching_tets)
