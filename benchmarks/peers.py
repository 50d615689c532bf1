"""The GPU libraries of the field beside our ops: results compared first, then both timed; a missing one is shown.

    pip install nvdiffrast drtk nerfacc kaolin diso ninja
    pip install git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch

Each peer returns (what, ours, theirs, agree): two callables, and a function of their results that raises, or returns a
figure of how far they are apart.
"""

import importlib
from collections.abc import Callable

import torch

from benchmarks import cases
from text3d_fast import ops
from text3d_fast.ops.tet_grid import TetGrid


def _close(ours, theirs, tolerance: float) -> float:
    apart = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))
    if not apart <= tolerance:
        raise AssertionError(f"results differ by {apart:.1e} of their norm, {tolerance:.0e} allowed")
    return apart


def _share(ours, theirs, tolerance: float) -> float:
    """How many pixels differ."""
    apart = float((ours != theirs).float().mean())
    if not apart <= tolerance:
        raise AssertionError(f"{apart:.2%} of the pixels differ, {tolerance:.2%} allowed")
    return apart


def tinycudann(device, small):
    tcnn = importlib.import_module("tinycudann")
    spec = ops.HashGridSpec(levels=16, log2_table_size=19, per_level_scale=1.5)
    config = {"otype": "HashGrid", "n_levels": 16, "n_features_per_level": 2, "log2_hashmap_size": 19,
              "base_resolution": 16, "per_level_scale": 1.5, "interpolation": "Linear"}
    encoding = tcnn.Encoding(3, config, dtype=torch.float32).to(device)
    params, x = encoding.params.detach().clone(), torch.rand(2**20, 3, device=device)
    return "hash grid", lambda: ops.hash_grid(x, params, spec), lambda: encoding(x), lambda a, b: _close(a, b, 1e-3)


def nerfacc(device, small):
    peer = importlib.import_module("nerfacc")
    origins, directions, grid, step = cases._rays(device, small)
    samples = ops.march_rays(origins, directions, grid, step=step)
    sigma, values = torch.rand(samples.num_samples, device=device), torch.rand(samples.num_samples, 3, device=device)
    ids = samples.ray_ids.long()

    def theirs():
        weights, _, _ = peer.render_weight_from_density(samples.t_starts, samples.t_ends, sigma, ray_indices=ids,
                                                        n_rays=len(origins))
        return peer.accumulate_along_rays(weights, values, ids, len(origins))

    ours = lambda: ops.composite(sigma, values, samples, early_stop=0.0).values
    return "composite", ours, theirs, lambda a, b: _close(a, b, 1e-4)


def nvdiffrast(device, small):
    peer = importlib.import_module("nvdiffrast.torch")
    pos, tri, size = cases._sphere(device, small)
    context = peer.RasterizeCudaContext(device=device)
    ours, theirs = lambda: ops.rasterize(pos, tri, size)[0], lambda: peer.rasterize(context, pos, tri, size)[0]
    return "rasterize", ours, theirs, lambda a, b: _share(a[..., 3], b[..., 3], 1e-3)


def drtk(device, small):
    peer = importlib.import_module("drtk")
    pos, tri, (height, width) = cases._sphere(device, small)
    x, y, z = (pos[..., 0] + 1) * (width / 2) - 0.5, (pos[..., 1] + 1) * (height / 2) - 0.5, pos[..., 2] + 2
    pixels = torch.stack([x, y, z], -1).contiguous()
    ours = lambda: ops.rasterize(pos, tri, (height, width))[0][..., 3] > 0
    theirs = lambda: peer.rasterize(pixels, tri, height, width) >= 0
    return "rasterize (coverage)", ours, theirs, lambda a, b: _share(a, b, 1e-2)


def kaolin(device, small):
    peer = importlib.import_module("kaolin.ops.conversions")
    grid = TetGrid.kuhn(16 if small else 64, device=device)
    sdf, tets = 0.7 - grid.positions.norm(dim=-1), grid.tets.long()
    ours = lambda: ops.marching_tets(grid.positions, sdf, grid)[0]
    theirs = lambda: peer.marching_tetrahedra(grid.positions[None], tets, sdf[None])[0][0]
    return "marching tets", ours, theirs, lambda a, b: _close(a, b, 1e-5)


def _area(vertices, faces):
    a, b, c = vertices[faces.long()].unbind(1)
    return torch.linalg.cross(b - a, c - a).norm(dim=-1).sum() / 2


def diso(device, small):
    peer = importlib.import_module("diso")
    side = 17 if small else 65
    grid = TetGrid.kuhn(side - 1, device=device)
    sdf, extract = 0.7 - grid.positions.norm(dim=-1), peer.DiffMC(dtype=torch.float32).to(device)
    field = -sdf.view(side, side, side).contiguous()
    ours, theirs = lambda: _area(*ops.marching_tets(grid.positions, sdf, grid)), lambda: 4 * _area(*extract(field))
    return "isosurface (area)", ours, theirs, lambda a, b: _close(a, b, 2e-2)


ALL: tuple[Callable, ...] = (tinycudann, nerfacc, nvdiffrast, drtk, kaolin, diso)
