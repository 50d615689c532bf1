"""march_rays against packed plain torch. Checks, then times.

    pytest benchmarks/bench_march.py --benchmark-only

W1 is DreamFusion's usual 64^2 rays in a box of +-2 seen from inside it, step 1.732 * 4 / 512: 1.2 million samples when
the grid is full. `shell` is a hollow ball in 128^3 cells: most of each ray is empty.
"""

import importlib.util

import pytest
import torch

from text3d_fast import nn, ops

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
STEP = 1.732 * 4 / 512


def plain_torch(origins, directions, grid, far, step, jitter):
    """What one writes without kernels: all steps of all rays inside the box, packed, float32; no nesting, no cone."""
    low, high, size = grid.aabb[:3], grid.aabb[3:], torch.tensor(grid.resolution, device=origins.device)
    inverse = 1 / directions
    t0, t1 = (low - origins) * inverse, (high - origins) * inverse
    enter = torch.minimum(t0, t1).amax(-1).clamp(min=0)
    leave = torch.maximum(t0, t1).amin(-1).clamp(max=far)
    first = jitter * step
    begin = ((enter - first) / step - 0.5).ceil().clamp(min=0)
    count = (((leave - first) / step - 0.5).floor() + 1 - begin).clamp(min=0).long()
    ids = torch.repeat_interleave(torch.arange(len(origins), device=origins.device), count)
    k = torch.arange(len(ids), device=ids.device) - (count.cumsum(0) - count)[ids] + begin[ids]
    starts = first[ids] + k * step
    points = origins[ids] + (starts + 0.5 * step)[:, None] * directions[ids]
    cell = ((points - low) / (high - low) * size).long()
    cell = torch.minimum(cell.clamp(min=0), size - 1)
    keep = grid.binaries[0, cell[:, 0], cell[:, 1], cell[:, 2]]
    ids, starts = ids[keep], starts[keep]
    offsets = torch.nn.functional.pad(torch.bincount(ids, minlength=len(origins)).cumsum(0), (1, 0))
    return ops.RaySamples(ids.int(), starts, starts + step, offsets.int())


def make_case(name, device):
    generator = torch.Generator().manual_seed(0)
    side = 64
    axis = torch.linspace(-0.36, 0.36, side)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    directions = torch.nn.functional.normalize(torch.stack([x, y, -torch.ones_like(x)], -1).view(-1, 3), dim=-1)
    origins = torch.tensor([0.0, 0.0, 1.75]).expand(side * side, 3).contiguous()
    grid = nn.OccupancyGrid([-2] * 3 + [2] * 3, 32 if name == "full" else 128)
    if name == "shell":
        grid.update(0, lambda p: ((p.norm(dim=-1) - 1).abs() < 0.05).float(), generator)
    jitter = torch.rand(side * side, generator=generator)
    return [x.to(device) for x in (origins, directions, grid, jitter)]


def run(kind, origins, directions, grid, jitter, capacity):
    if kind == "plain torch":
        return plain_torch(origins, directions, grid, 1e3, STEP, jitter)
    if kind == "torch.compile":
        return COMPILED(origins, directions, grid, 1e3, STEP, jitter)
    if kind == "nerfacc":
        import nerfacc

        estimator = nerfacc.OccGridEstimator(grid.aabb, grid.resolution).to(origins.device)
        estimator.binaries = grid.binaries
        return estimator.sampling(origins, directions, far_plane=1e3, render_step_size=STEP)
    capacity = capacity if kind == "capacity" else None
    cone = 1 / 256 if kind == "cone" else 0.0
    return ops.march_rays(origins, directions, grid, 0.0, 1e3, STEP, jitter, cone, capacity)


COMPILED = torch.compile(plain_torch, dynamic=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["full", "shell"])
@pytest.mark.parametrize("kind", ["exact", "capacity", "cone", "plain torch", "torch.compile", "nerfacc"])
def test_march(benchmark, name, kind, device):
    if kind == "nerfacc" and (device == "cpu" or importlib.util.find_spec("nerfacc") is None):
        pytest.skip("nerfacc is not installed" if device == "cuda" else "nerfacc has no CPU code")
    case = make_case(name, device)
    expected = plain_torch(*case[:3], 1e3, STEP, case[3])
    exact = run("exact", *case, None)
    # they may differ where a sample's middle lies on a face between cells
    assert abs(exact.num_samples - expected.num_samples) <= 1e-4 * expected.num_samples
    benchmark.group = f"march {name}, {exact.num_samples} samples, {device}"
    if device == "cuda":

        def timed():
            run(kind, *case, exact.num_samples)
            torch.cuda.synchronize()
    else:

        def timed():
            run(kind, *case, exact.num_samples)

    benchmark.pedantic(timed, rounds=40 if kind in ("exact", "capacity", "cone") else 4, warmup_rounds=1)
