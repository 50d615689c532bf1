"""Rays through axis-aligned boxes and through nested grids of cells."""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from text3d_fast import ops
from text3d_fast.compat.nerfacc._walk import walk
from text3d_fast.compat.nerfacc.data_specs import RayIntervals, RaySamples


@torch.no_grad()
def ray_aabb_intersect(
    rays_o: Tensor,
    rays_d: Tensor,
    aabbs: Tensor,
    near_plane: float = -math.inf,
    far_plane: float = math.inf,
    miss_value: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> t_mins, t_maxs, hits, each [rays, boxes]: where each ray [rays, 3] enters and leaves each box [boxes, 6].

    Times are clamped to near_plane and far_plane; a ray that misses a box, or has it behind itself, has miss_value.
    """
    for name, tensor, size in (("rays_o", rays_o, 3), ("rays_d", rays_d, 3), ("aabbs", aabbs, 6)):
        if tensor.dim() != 2 or tensor.shape[1] != size:
            raise ValueError(f"{name}: expected shape [n, {size}], got {list(tensor.shape)}")
    t_mins, t_maxs = aabbs.new_full((2, len(rays_o), len(aabbs)), -math.inf)
    t_maxs = -t_mins
    for axis in range(3):
        origin, by = rays_o[:, axis, None], 1 / rays_d[:, axis, None]
        low, high = (aabbs[:, axis] - origin) * by, (aabbs[:, axis + 3] - origin) * by
        # Along a ray that lies in a face 0 * inf is NaN: that axis decides nothing.
        t_mins = torch.fmax(t_mins, torch.minimum(low, high))
        t_maxs = torch.fmin(t_maxs, torch.maximum(low, high))
    hits = (t_mins <= t_maxs) & (t_maxs > 0)
    t_mins, t_maxs = (t.clamp(near_plane, far_plane).masked_fill(~hits, miss_value) for t in (t_mins, t_maxs))
    return t_mins, t_maxs, hits


_ray_aabb_intersect = ray_aabb_intersect  # the original keeps a slower twin of that name


@torch.no_grad()
def traverse_grids(
    rays_o: Tensor,
    rays_d: Tensor,
    binaries: Tensor,
    aabbs: Tensor,
    near_planes: Tensor | None = None,
    far_planes: Tensor | None = None,
    step_size: float = 1e-3,
    cone_angle: float = 0.0,
    traverse_steps_limit: int | None = None,
    over_allocate: bool = False,
    rays_mask: Tensor | None = None,
    t_sorted: Tensor | None = None,
    t_indices: Tensor | None = None,
    hits: Tensor | None = None,
) -> tuple[RayIntervals, RaySamples, Tensor]:
    """-> intervals, samples, termination planes [rays]: where rays [rays, 3] pass occupied cells.

    binaries: bool [grids, x, y, z]; aabbs: float [grids, 6]. near_planes, far_planes: float [rays], 0 and inf.
    step_size, cone_angle: interval k is [t_k, t_k + max(step_size, cone_angle t_k)], kept if its middle is before
        far_planes and in an occupied cell; step_size <= 0: one interval for each occupied cell.
    traverse_steps_limit: at most so many samples a ray. Where it ends, the termination plane says where to go on.
    over_allocate: accepted; no room is left over, so all samples are valid. rays_mask: bool [rays], false: no samples.
    t_sorted, t_indices, hits: accepted; computed anew.
    Grids whose boxes double about one centre go through `ops.march_rays`; others through plain torch.
    """
    if over_allocate and not (traverse_steps_limit or 0) > 0:
        raise ValueError(f"traverse_steps_limit: expected a number with over_allocate, got {traverse_steps_limit}")
    near = rays_o.new_zeros(len(rays_o)) if near_planes is None else near_planes
    far = torch.full_like(near, math.inf) if far_planes is None else far_planes
    if rays_mask is not None:
        far = far.masked_fill(~rays_mask, -math.inf)
    doubling = torch.stack([_enlarge_aabb(aabbs[0], 2.0**i) for i in range(len(aabbs))])
    if step_size > 0 and torch.allclose(aabbs, doubling, rtol=1e-5, atol=0):
        samples = march(rays_o, rays_d, binaries, aabbs[0], near, far, step_size, cone_angle)
    else:
        samples = walk(rays_o, rays_d, binaries, aabbs, near, far, step_size, cone_angle)
    rays, starts, ends = samples
    count = torch.bincount(rays, minlength=len(rays_o))
    terminate = near
    if traverse_steps_limit is not None and traverse_steps_limit > 0:
        place = torch.arange(len(rays), device=rays.device) - (count.cumsum(0) - count)[rays]
        kept = place < traverse_steps_limit
        rays, starts, ends = rays[kept], starts[kept], ends[kept]
        count = count.clamp(max=traverse_steps_limit)
    last = count.cumsum(0) - 1
    if len(ends):
        terminate = torch.where(count > 0, ends[last.clamp(min=0)], near)
    if traverse_steps_limit is None or traverse_steps_limit <= 0 or bool((count < traverse_steps_limit).any()):
        t_mins, t_maxs, hit = ray_aabb_intersect(rays_o, rays_d, aabbs)
        leave = torch.minimum(t_maxs.masked_fill(~hit, -math.inf).amax(1), far)
        whole = leave > near if traverse_steps_limit is None else (leave > near) & (count < traverse_steps_limit)
        terminate = torch.where(whole, torch.maximum(terminate, leave), terminate)
    return (*_specs(rays, starts, ends, count), terminate)


def march(rays_o, rays_d, binaries, aabb, near, far, step, cone_angle) -> tuple[Tensor, Tensor, Tensor]:
    """Samples by ops.march_rays: rays int64, starts, ends. Unlike there, the last interval may reach beyond `far`, by
    less than half its length, and is kept if its middle does not."""
    grid = SimpleNamespace(aabb=aabb.float(), binaries=binaries)
    beyond = far + 0.75 * (step if cone_angle == 0 else (cone_angle * far).clamp(min=step))
    samples = ops.march_rays(rays_o.float(), rays_d.float(), grid, near.float(), beyond.float(), step,
                             cone_angle=cone_angle)  # fmt: skip
    rays, starts, ends = samples.ray_ids.long(), samples.t_starts, samples.t_ends
    kept = samples.t_middles < far[rays]
    return rays[kept], starts[kept], ends[kept]


def _specs(rays: Tensor, starts: Tensor, ends: Tensor, count: Tensor) -> tuple[RayIntervals, RaySamples]:
    """Intervals that follow each other on a ray share an edge."""
    first = count.cumsum(0) - count
    samples = RaySamples((starts + ends) * 0.5, torch.stack([first, count], -1), rays, torch.ones_like(rays).bool())
    opens = torch.ones_like(samples.is_valid)
    opens[1:] = (rays[1:] != rays[:-1]) | (starts[1:] != ends[:-1])
    right = torch.arange(len(rays), device=rays.device) + opens.cumsum(0)  # where the edge at the end of each one lies
    edges = int(right[-1]) + 1 if len(rays) else 0
    vals, indices = starts.new_empty(edges), rays.new_empty(edges)
    is_left, is_right = (torch.zeros(edges, dtype=torch.bool, device=rays.device) for _ in range(2))
    vals[right], vals[right - 1] = ends, starts
    indices[right], indices[right - 1] = rays, rays
    is_right[right], is_left[right - 1] = True, True
    per_ray = torch.bincount(indices, minlength=len(count))
    packed_info = torch.stack([per_ray.cumsum(0) - per_ray, per_ray], -1)
    return RayIntervals(vals, packed_info, indices, is_left, is_right), samples


def _enlarge_aabb(aabb: Tensor, factor: float) -> Tensor:
    """The box [6] scaled about its centre."""
    centre, half = (aabb[:3] + aabb[3:]) / 2, (aabb[3:] - aabb[:3]) / 2
    return torch.cat([centre - half * factor, centre + half * factor])


def _query(x: Tensor, data: Tensor, base_aabb: Tensor) -> tuple[Tensor, Tensor]:
    """-> values [points] of the innermost grid around each point, 0 outside all, and whether it is inside [points].

    x: [points, 3]; data: [grids, x, y, z]; base_aabb: [6], the box of grid 0, of which grid i is 2^i times as large.
    """
    unit = (x - base_aabb[:3]) / (base_aabb[3:] - base_aabb[:3]) - 0.5
    # frexp gives the power of two above the distance; far inside, grid 0 anyway, where it would give 0 for 0.
    level = (torch.frexp(unit.abs().amax(-1).clamp(min=0.1))[1].long() + 1).clamp(min=0)
    inside = level < data.shape[0]
    size = torch.tensor(data.shape[1:], device=x.device)
    cell = ((unit / 2.0 ** level[:, None] + 0.5) * size).long()
    cell = torch.minimum(cell.clamp(min=0), size - 1)
    return data[level.clamp(max=data.shape[0] - 1), cell[:, 0], cell[:, 1], cell[:, 2]] * inside, inside
