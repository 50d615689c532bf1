"""Rays through any grids, in plain torch: what `ops.march_rays` does not do."""

import torch
from torch import Tensor

_ROWS = 2**22  # candidates that are looked at together


def walk(
    rays_o: Tensor, rays_d: Tensor, binaries: Tensor, aabbs: Tensor, near: Tensor, far: Tensor, step: float, cone: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Ray int64, start and end of each interval whose middle lies in an occupied cell; see grid.traverse_grids.

    A middle is looked up in the grid of the stretch between two crossings of boxes that it lies in: the one entered
    last, or, behind a box that was left, the one that is left next.
    """
    stretches = _stretches(rays_o, rays_d, aabbs, near, far)
    found = []
    chunk = max(1, _ROWS // (2 * len(aabbs) * (sum(binaries.shape[1:]) + 3))) if step <= 0 else len(rays_o)
    for begin in range(0, len(rays_o), chunk):
        rays = slice(begin, begin + chunk)
        pieces = [s[rays] for s in stretches]
        if step <= 0:
            ray, start, end, level = _cells(rays_o[rays], rays_d[rays], binaries, aabbs, *pieces)
        else:
            ray, start, end, level = _steps(near[rays], *pieces, step, cone)
        middle = 0.5 * (start + end)
        points = rays_o[rays][ray] + middle[:, None] * rays_d[rays][ray]
        low, high = aabbs[level].split(3, -1)
        size = torch.tensor(binaries.shape[1:], device=level.device)
        cell = torch.minimum(((points - low) / (high - low) * size).long().clamp(min=0), size - 1)
        kept = binaries[level, cell[:, 0], cell[:, 1], cell[:, 2]]
        found.append((ray[kept] + begin, start[kept], end[kept]))
    if not found:
        empty = rays_o.new_empty(0)
        return empty.long(), empty, empty
    return tuple(torch.cat(parts) for parts in zip(*found))


def _stretches(rays_o, rays_d, aabbs, near, far) -> tuple[Tensor, Tensor, Tensor]:
    """Begin, end and grid of the stretches between crossings, each [rays, 2 grids - 1]; some are empty."""
    from text3d_fast.compat.nerfacc.grid import ray_aabb_intersect

    t_mins, t_maxs, hits = ray_aabb_intersect(rays_o, rays_d, aabbs)
    times, order = torch.sort(torch.cat([t_mins, t_maxs], -1), dim=-1, stable=True)
    grids = len(aabbs)
    entering, level = order < grids, order % grids
    here, after = entering[:, :-1], entering[:, 1:]
    level = torch.where(here, level[:, :-1], level[:, 1:])
    valid = hits.gather(1, order[:, :-1] % grids) & hits.gather(1, level) & (here | ~after)
    begin = torch.maximum(times[:, :-1], near[:, None])
    end = torch.minimum(times[:, 1:], far[:, None])
    return begin, torch.where(valid, end, begin), level


def _steps(near, begin, end, level, step, cone) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ray, start, end, grid of the intervals of the lattice from `near` on whose middle lies in a stretch."""
    open_ = end > begin
    leave, enter = end.masked_fill(~open_, -torch.inf).amax(1), begin.masked_fill(~open_, torch.inf).amin(1)
    if cone > 0:
        from text3d_fast.reference.march_rays import Lattice

        lattice = Lattice(near.double(), step, cone)
        time, index = lattice.time, lattice.index
    else:
        time = lambda k, ray: near.double()[ray] + k * step
        index = lambda t: (t - near.double()) / step
    hit = leave > enter
    first = (index(torch.where(hit, enter, near).double()).floor() - 1).clamp(min=0)
    last = index(torch.where(hit, leave, near).double()).ceil() + 1
    count = torch.where(hit, last - first, 0).clamp(min=0).long()
    ray = torch.arange(len(near), device=near.device).repeat_interleave(count)
    k = torch.arange(len(ray), device=near.device) - (count.cumsum(0) - count)[ray] + first[ray]
    start, stop = time(k, ray).to(near.dtype), time(k + 1, ray).to(near.dtype)
    middle = 0.5 * (start + stop)
    place = torch.full_like(ray, -1)
    for i in range(begin.shape[1]):
        inside = (begin[ray, i] <= middle) & (middle < end[ray, i])
        place = torch.where(inside & (place < 0), i, place)
    kept = place >= 0
    return ray[kept], start[kept], stop[kept], level[ray[kept], place[kept]]


def _cells(rays_o, rays_d, binaries, aabbs, begin, end, level) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ray, start, end, grid of the parts into which the faces of cells cut the stretches."""
    rays, stretches = begin.shape
    low, high = aabbs[level].split(3, -1)
    cuts = [begin[..., None], end[..., None]]
    for axis, cells in enumerate(binaries.shape[1:]):
        faces = torch.linspace(0, 1, cells + 1, device=begin.device, dtype=begin.dtype)
        face = low[..., axis, None] + (high - low)[..., axis, None] * faces
        time = (face - rays_o[:, None, axis, None]) / rays_d[:, None, axis, None]
        cuts.append(torch.where(time.isfinite(), time, begin[..., None]))
    cuts = torch.cat(cuts, -1)
    cuts = torch.sort(torch.minimum(torch.maximum(cuts, begin[..., None]), end[..., None]), -1)[0]
    start, stop = cuts[..., :-1], cuts[..., 1:]
    shape = start.shape
    kept = stop > start
    ray = torch.arange(rays, device=begin.device)[:, None, None].expand(shape)
    return ray[kept], start[kept], stop[kept], level[..., None].expand(shape)[kept]
