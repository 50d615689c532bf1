"""Dropping samples that cannot be seen, before the expensive part of a field is evaluated on them."""

import dataclasses
import math

import torch

from text3d_fast.ops.checks import require_indices
from text3d_fast.ops.samples import RaySamples, check_samples
from text3d_fast.ops.typed import typed


@typed
@torch.no_grad()
def prune_samples(
    samples: RaySamples,
    sigma: torch.Tensor,
    early_stop: float = 1e-4,
    alpha_threshold: float = 0.0,
    capacity: int | None = None,
) -> tuple[RaySamples, torch.Tensor]:
    """Keep the samples that light reaches (transmittance >= early_stop) and that are not too thin
    (1 - exp(-sigma delta) >= alpha_threshold); the transmittance is that over all samples, as in nerfacc.

    sigma: float [S], a density of the samples: the field's own, evaluated without gradient, or a cached one.
    capacity: None: as many as there are, one host synchronization on a GPU; an int: this many, padded as in
        `march_rays`, without a synchronization.
    Returns the kept samples and their indices int64 [K] among the given ones, so that what is already known of them
    can be taken along: `features[kept]`. Padding has index 0, ray 0 and zero length. Not differentiable.

    What to do with it: a field costs about one unit forward and two backward. Evaluating all S samples once with
    gradients costs 3 S; a first look without gradients, pruning and a second look at K samples S + 3 K: better if
    K < 2/3 S, which opaque objects reach soon. With features from the first look (`features[kept]`) there is one
    evaluation only, and a backward pass that skips rows without a gradient costs S + 2 K.
    A NaN in sigma keeps its sample and those behind it on its ray; other rays do not see it.
    Raises ValueError or TypeError for wrong shapes, dtypes or devices; on a CPU also for ids and offsets out of range.
    """
    check_samples(sigma, samples.t_starts, samples.t_ends, samples.ray_ids, samples.ray_offsets)
    count = samples.num_samples
    if not 0 <= early_stop < 1:
        raise ValueError(f"early_stop: expected a number in [0, 1), got {early_stop}")
    if not 0 <= alpha_threshold < 1:
        raise ValueError(f"alpha_threshold: expected a number in [0, 1), got {alpha_threshold}")
    if capacity is not None and not 0 <= capacity < 2**31:
        raise ValueError(f"capacity: expected None or a count below 2^31, got {capacity}")
    device = sigma.device
    if device.type == "cpu":
        require_indices("samples.ray_ids", samples.ray_ids, samples.num_rays)
        require_indices("samples.ray_offsets", samples.ray_offsets, count + 1)
    optical = sigma * (samples.t_ends - samples.t_starts)
    # One running sum over all rays, without a synchronization: in double precision a ray's own part keeps its digits.
    # Neither a wall of infinite density nor a NaN may reach the rays behind it in memory: 1000 is as opaque as
    # infinity, and NaN is counted apart. What lies behind a NaN on its own ray is kept.
    unknown = optical.isnan()
    depths = optical.double().nan_to_num(0.0).clamp(-1e3, 1e3)
    before, unknown_before = depths.cumsum(0) - depths, unknown.cumsum(0, dtype=torch.int32) - unknown.int()
    ray_begin = samples.ray_offsets[:-1].long()
    ids = samples.ray_ids.long()
    keep = torch.arange(count, device=device) < samples.ray_offsets[-1]
    if count:
        first = ray_begin.clamp(max=count - 1)[ids]
        hidden = before - before[first] > (math.inf if early_stop == 0 else -math.log(early_stop))
        keep &= ~hidden | (unknown_before > unknown_before[first])
        keep &= ~(optical < -math.log1p(-alpha_threshold))
    position = torch.nn.functional.pad(keep.cumsum(0, dtype=torch.int32), (1, 0))
    offsets = position[samples.ray_offsets.long()]
    if capacity is None:
        kept = keep.nonzero().squeeze(1)
        return dataclasses.replace(
            samples, ray_ids=samples.ray_ids[kept], t_starts=samples.t_starts[kept], t_ends=samples.t_ends[kept],
            ray_offsets=offsets, overflow=None), kept  # fmt: skip
    total = position[-1]
    kept = torch.nonzero_static(keep, size=capacity, fill_value=0).squeeze(1)
    real = torch.arange(capacity, device=device) < total
    if count:
        ids, starts, ends = (torch.where(real, x[kept], 0) for x in (samples.ray_ids, samples.t_starts, samples.t_ends))
    else:
        ids, starts, ends = (x.new_zeros(capacity) for x in (samples.ray_ids, samples.t_starts, samples.t_ends))
    overflow = total > capacity
    if samples.overflow is not None:
        overflow = overflow | samples.overflow
    return RaySamples(ids, starts, ends, offsets.clamp(max=capacity), overflow), kept
