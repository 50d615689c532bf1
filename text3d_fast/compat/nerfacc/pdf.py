"""Sampling by inverse transform, and searching along rays."""

import torch
from torch import Tensor

from text3d_fast.compat.nerfacc.data_specs import RayIntervals, RaySamples


def searchsorted(
    sorted_sequence: RayIntervals | RaySamples, values: RayIntervals | RaySamples
) -> tuple[Tensor, Tensor]:
    """-> ids_left, ids_right, int64 in the shape of values.vals: keys[ids_left] <= values < keys[ids_right].

    Values beyond the keys of their ray are treated as clipped to them. Ids count along the ray for batched values, and
    through all keys for packed ones.
    """
    rows = _Rows(sorted_sequence)
    query = values.vals
    rays = _ray_of_each(values)
    # The last key is left out: a value at or beyond it lies in the last interval.
    upper = rows.upper_bound(rows.vals, query.reshape(-1), rays)
    base = rows.first[rays] if query.dim() == 1 else 0
    last = rows.count[rays] - 1
    left, right = (upper - 1).clamp(min=0), torch.minimum(upper, last)
    return (base + torch.minimum(left, last)).view(query.shape), (base + right).view(query.shape)


def importance_sampling(
    intervals: RayIntervals, cdfs: Tensor, n_intervals_per_ray: Tensor | int, stratified: bool = False
) -> tuple[RayIntervals, RaySamples]:
    """-> new intervals and their middles, drawn from the distribution along each ray.

    cdfs: cumulative distribution at intervals.vals, in the same shape. n_intervals_per_ray: one number, which gives
    batched results, or int [rays], which gives packed ones. stratified: one random offset a ray instead of the middle.
    Gradients flow to intervals.vals and cdfs, unlike in the original.
    """
    rows = _Rows(intervals)
    batched = not isinstance(n_intervals_per_ray, Tensor)
    device, vals = cdfs.device, intervals.vals.reshape(-1)
    if batched:
        counts = torch.full((rows.rays,), n_intervals_per_ray, device=device)
        rays = torch.arange(rows.rays, device=device).repeat_interleave(n_intervals_per_ray)
    else:
        counts = n_intervals_per_ray.reshape(-1).long()
        rays = torch.arange(rows.rays, device=device).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    place = torch.arange(len(rays), device=device) - first[rays]

    flat = cdfs.reshape(-1)
    low, high = flat[rows.first], flat[rows.first + rows.count - 1]
    bias = torch.rand(rows.rays, device=device, dtype=flat.dtype) if stratified else flat.new_full((rows.rays,), 0.5)
    u = low[rays] + (place + bias[rays]) * ((high - low) / counts)[rays]
    upper = rows.upper_bound(rows.pad(flat.detach()), u.detach(), rays)
    base, last = rows.first[rays], rows.count[rays] - 1
    p0, p1 = base + torch.minimum((upper - 1).clamp(min=0), last), base + torch.minimum(upper, last)
    width = flat[p1] - flat[p0]
    flatland = width < 1e-10
    share = torch.where(flatland, 0.5, (u - flat[p0]) / torch.where(flatland, 1.0, width))
    middles = vals[p0] + share * (vals[p1] - vals[p0])

    # Edges lie between the middles, and as far outside the outer ones, but not beyond the ray's ends.
    begins, ends = vals[rows.first[rays]], vals[(rows.first + rows.count - 1)[rays]]
    is_first, is_last = place == 0, place == counts[rays] - 1
    before = torch.where(is_first, middles, torch.roll(middles, 1))
    after = torch.where(is_last, middles, torch.roll(middles, -1))
    left = torch.where(is_first, torch.maximum(middles - (after - middles) * 0.5, begins), (before + middles) * 0.5)
    right = torch.where(is_last, torch.minimum(middles + (middles - before) * 0.5, ends), (middles + after) * 0.5)
    if batched:
        shape = (*intervals.vals.shape[:-1], n_intervals_per_ray) if intervals.vals.dim() > 1 else (rows.rays, -1)
        left, right, middles = left.view(shape), right.view(shape), middles.view(shape)
        return RayIntervals(torch.cat([left, right[..., -1:]], -1)), RaySamples(middles)
    edges = counts + (counts > 0)
    edge_first = edges.cumsum(0) - edges
    where_left = edge_first[rays] + place
    total = len(rays) + int((counts > 0).sum())
    edge_vals = vals.new_zeros(total).index_put((where_left,), left)
    edge_vals = edge_vals.index_put((where_left[is_last] + 1,), right[is_last])
    indices = torch.arange(rows.rays, device=device).repeat_interleave(edges)
    is_left = torch.zeros(total, dtype=torch.bool, device=device).index_fill_(0, where_left, True)
    is_right = torch.zeros_like(is_left).index_fill_(0, where_left + 1, True)
    return (RayIntervals(edge_vals, torch.stack([edge_first, edges], -1), indices, is_left, is_right),
            RaySamples(middles, torch.stack([first, counts], -1), rays))  # fmt: skip


class _Rows:
    """Keys as a table with a row for each ray: vals [rays, longest], filled up with infinity."""

    def __init__(self, keys: RayIntervals | RaySamples):
        vals = keys.vals.detach()
        if vals.dim() > 1:
            self.vals = vals.reshape(-1, vals.shape[-1]).contiguous()
            self.rays, edges = self.vals.shape
            self.count = torch.full((self.rays,), edges, device=vals.device)
            self.first = torch.arange(self.rays, device=vals.device) * edges
            return
        if keys.packed_info is None:
            raise ValueError("packed_info: expected, as vals are packed; got None")
        self.first, self.count = keys.packed_info.long().unbind(1)
        self.rays = len(self.first)
        self.vals = self.pad(vals)

    def pad(self, flat: Tensor) -> Tensor:
        longest = int(self.count.max()) if self.rays else 0
        column = torch.arange(longest, device=flat.device)
        inside = column < self.count[:, None]
        place = (self.first[:, None] + column).clamp(max=max(len(flat) - 1, 0))
        return torch.where(inside, flat[place], torch.inf) if len(flat) else flat.new_empty(self.rays, 0)

    def upper_bound(self, rows: Tensor, values: Tensor, rays: Tensor) -> Tensor:
        """How many keys of its ray, the last one left out, are <= each value; int64 [values]."""
        counts = torch.bincount(rays, minlength=self.rays)
        width = int(counts.max()) if self.rays else 0
        place = torch.arange(len(rays), device=rays.device) - (counts.cumsum(0) - counts)[rays]
        table = values.new_zeros(self.rays, width)
        table[rays, place] = values
        return torch.minimum(torch.searchsorted(rows, table, right=True)[rays, place], self.count[rays] - 1)


def _ray_of_each(values: RayIntervals | RaySamples) -> Tensor:
    if values.vals.dim() > 1:
        rays = values.vals.numel() // values.vals.shape[-1] if values.vals.shape[-1] else 0
        return torch.arange(rays, device=values.device).repeat_interleave(values.vals.shape[-1])
    if values.ray_indices is not None:
        return values.ray_indices.long()
    if values.packed_info is None:
        raise ValueError("packed_info or ray_indices: expected, as vals are packed; got None")
    return torch.arange(len(values.packed_info), device=values.device).repeat_interleave(values.packed_info[:, 1])


def _sample_from_weighted(
    bins: Tensor, weights: Tensor, num_samples: int, stratified: bool = False, vmin=-torch.inf, vmax=torch.inf
) -> tuple[Tensor, Tensor]:
    """-> edges [..., num_samples + 1] and middles [..., num_samples] drawn from a histogram, as mip-NeRF 360 does.

    bins: [..., B + 1], weights: [..., B]. The original's check of importance_sampling, by another road.
    """
    eps = torch.finfo(weights.dtype).eps
    mass = torch.nn.functional.normalize(weights, p=1, dim=-1)
    cdf = torch.nn.functional.pad(mass[..., :-1].cumsum(-1), (1, 0))
    cdf = torch.cat([cdf, torch.ones_like(cdf[..., :1])], -1)
    if stratified:
        top = eps + (1 - eps) / num_samples
        room = (1 - top) / max(num_samples - 1, 1) - eps
        u = torch.linspace(0, 1 - top, num_samples, dtype=bins.dtype, device=bins.device)
        u = u + torch.rand(*bins.shape[:-1], 1, dtype=bins.dtype, device=bins.device) * room
    else:
        margin = 1 / (2 * num_samples)
        u = torch.linspace(margin, 1 - margin - eps, num_samples, dtype=bins.dtype, device=bins.device)
        u = u.expand(*bins.shape[:-1], num_samples)
    above = torch.searchsorted(cdf.contiguous(), u.contiguous(), right=True)
    cdf0, cdf1 = cdf.gather(-1, above - 1), cdf.gather(-1, above)
    bin0, bin1 = bins.gather(-1, above - 1), bins.gather(-1, above)
    middles = bin0 + (u - cdf0) / (cdf1 - cdf0).clamp(min=eps) * (bin1 - bin0)
    inner = 0.5 * (middles[..., 1:] + middles[..., :-1])
    left = (2 * middles[..., :1] - inner[..., :1]).clamp_min(vmin)
    right = (2 * middles[..., -1:] - inner[..., -1:]).clamp_max(vmax)
    return torch.cat([left, inner, right], -1), middles
