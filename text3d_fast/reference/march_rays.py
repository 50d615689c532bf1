"""Sampling rays through an occupancy grid in plain torch: the oracle for `ops.march_rays`."""

import torch

LAST_TIME = 1e38  # later ones would not fit single precision


def _per_ray(value: float | torch.Tensor, rays: int, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=device).expand(rays)


class Lattice:
    """The times t_k at which a ray may be cut, k >= 0: t_0 = near + jitter * step, then
    t_{k+1} = t_k + max(step, cone_angle * t_k), in closed form: first linear in k, later geometric."""

    def __init__(self, first: torch.Tensor, step: float, cone_angle: float):
        self.first, self.step, self.cone_angle = first, step, cone_angle
        if cone_angle > 0:
            self.bend = torch.ceil((step / cone_angle - first) / step).clamp(min=0)
            self.bend_time = first + self.bend * step

    def time(self, k: torch.Tensor, ray: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        linear = self.first[ray] + k * self.step
        if self.cone_angle == 0:
            return linear
        beyond = (k - self.bend[ray]).clamp(min=0)
        return torch.where(beyond > 0, self.bend_time[ray] * (1 + self.cone_angle) ** beyond, linear)

    def index(self, t: torch.Tensor) -> torch.Tensor:
        """The real-valued k with time(k) = t."""
        linear = (t - self.first) / self.step
        if self.cone_angle == 0:
            return linear
        ratio = (t / self.bend_time).clamp(min=1)
        geometric = self.bend + ratio.log() / torch.tensor(self.cone_angle, dtype=t.dtype).log1p().item()
        return torch.where(t > self.bend_time, geometric, linear)


def occupied(points: torch.Tensor, binaries: torch.Tensor, aabb: torch.Tensor) -> torch.Tensor:
    """Is the cell around each point [N, 3] occupied, in the innermost level that contains the point? bool [N]"""
    levels, *resolution = binaries.shape
    centre, half = 0.5 * (aabb[:3] + aabb[3:]), 0.5 * (aabb[3:] - aabb[:3])
    unit = (points - centre) / half
    reach = unit.abs().amax(-1)
    level = torch.zeros_like(reach, dtype=torch.long)
    for i in range(levels - 1):
        level += (reach >= 2.0**i).long()
    size = torch.tensor(resolution, device=points.device)
    cell = torch.floor((unit * 0.5 ** level[:, None].to(unit.dtype) + 1) * 0.5 * size).long()
    cell = torch.minimum(cell.clamp(min=0), size - 1)
    inside = reach <= 2.0 ** (levels - 1)
    return binaries[level, cell[:, 0], cell[:, 1], cell[:, 2]] & inside


def march_rays(
    origins: torch.Tensor,
    directions: torch.Tensor,
    binaries: torch.Tensor,
    aabb: torch.Tensor,
    near: float | torch.Tensor,
    far: float | torch.Tensor,
    jitter: torch.Tensor | None,
    step: float,
    cone_angle: float,
    capacity: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `ops.march_rays`: every lattice interval within the outermost box is tested, without skipping.

    Times and cells are computed in float64, whatever the dtype of the rays; times are returned in that dtype.
    Returns ray_ids, t_starts, t_ends, ray_offsets, overflow; capacity is -1 in exact mode.
    """
    rays, device, dtype = origins.shape[0], origins.device, origins.dtype
    origins, directions, box = origins.double(), directions.double(), aabb.double()
    near, far = _per_ray(near, rays, device), _per_ray(far, rays, device)
    first = near + (0 if jitter is None else jitter.double()) * step
    lattice = Lattice(first, step, cone_angle)

    # in box units, as the kernels: in a box of 1e30, rounding decides where a ray enters it
    centre, half, outermost = 0.5 * (box[:3] + box[3:]), 0.5 * (box[3:] - box[:3]), 2.0 ** (binaries.shape[0] - 1)
    position, velocity = (origins - centre) / half, directions / half
    infinite = torch.full_like(origins, float("inf"))
    parallel, between = velocity == 0, position.abs() <= outermost
    low, high = (-outermost - position) / velocity, (outermost - position) / velocity
    enter = torch.where(parallel, torch.where(between, -infinite, infinite), torch.minimum(low, high)).amax(1)
    leave = torch.where(parallel, infinite, torch.maximum(low, high)).amin(1)
    enter, leave = torch.maximum(enter, first), torch.minimum(leave, far)
    finite = (half > 0).all() & position.isfinite().all(1) & velocity.isfinite().all(1)
    finite = finite & first.isfinite() & ~far.isnan()
    hit = finite & (velocity != 0).any(1) & (enter < leave) & (enter.abs() < LAST_TIME) & (leave.abs() < LAST_TIME)

    # One interval more on each side than needed: which of them count is decided by their own midpoints below.
    zero = torch.zeros_like(first)
    begin = (torch.floor(lattice.index(torch.where(hit, enter, first))) - 1).clamp(min=0)
    end = torch.where(hit, torch.ceil(lattice.index(torch.where(hit, leave, first))) + 1, zero)
    counts = torch.where(hit, (end - begin).clamp(min=0), zero).long()
    ids = torch.repeat_interleave(torch.arange(rays, device=device), counts)
    k = torch.arange(len(ids), device=device) - (counts.cumsum(0) - counts)[ids] + begin[ids]
    starts = lattice.time(k, ids)
    ends = torch.minimum(lattice.time(k + 1, ids), far[ids])
    middles = 0.5 * (starts + ends)
    points = origins[ids] + middles[:, None] * directions[ids]
    keep = (starts < far[ids]) & occupied(points, binaries, box)

    ids, starts, ends = ids[keep], starts[keep].to(dtype), ends[keep].to(dtype)
    offsets = torch.zeros(rays + 1, dtype=torch.int32, device=device)
    offsets[1:] = torch.bincount(ids, minlength=rays).cumsum(0)
    total = len(ids)
    overflow = torch.tensor(0 <= capacity < total, device=device)
    if capacity >= 0:
        padding = max(capacity - total, 0)
        ids, starts, ends = (torch.cat([x[:capacity], x.new_zeros(padding)]) for x in (ids, starts, ends))
        offsets.clamp_(max=capacity)
    return ids.int(), starts, ends, offsets, overflow
