"""Volume rendering of packed samples in plain torch: the oracle for `ops.composite`."""

import torch

from text3d_fast.reference.segmented_scan import segmented_scan

MINIMUM_OPACITY = 1e-10  # below it depth and variance are 0 and pass no gradient


def composite(
    sigma: torch.Tensor,
    values: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    ray_ids: torch.Tensor,
    ray_offsets: torch.Tensor,
    early_stop: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes and meaning as `ops.composite`; any floating dtype, differentiable any number of times."""
    rays, samples = ray_offsets.shape[0] - 1, sigma.shape[0]
    count = int(ray_offsets[-1])  # what follows is padding of capacity mode, which belongs to no ray
    ids = ray_ids[:count].long()
    sigma, values, t_starts, t_ends = (x[:count] for x in (sigma, values, t_starts, t_ends))
    optical = sigma * (t_ends - t_starts)
    transmittance = torch.exp(-segmented_scan(optical, ray_offsets, "sum", exclusive=True, reverse=False))
    weights = transmittance * -torch.expm1(-optical)
    weights = torch.where(transmittance < early_stop, torch.zeros_like(weights), weights)

    def accumulate(per_sample: torch.Tensor) -> torch.Tensor:
        out = torch.zeros((rays, *per_sample.shape[1:]), dtype=per_sample.dtype, device=per_sample.device)
        return out.index_add(0, ids, per_sample)

    opacity = accumulate(weights)
    seen = opacity > MINIMUM_OPACITY
    safe = torch.where(seen, opacity, torch.ones_like(opacity))
    middles = 0.5 * (t_starts + t_ends)
    zero = torch.zeros_like(opacity)
    depth = torch.where(seen, accumulate(weights * middles) / safe, zero)
    spread = accumulate(weights * (middles - depth[ids]) ** 2)
    depth_variance = torch.where(seen, spread / safe, zero)
    weights_out = torch.cat([weights, weights.new_zeros(samples - count)]) if samples > count else weights
    return accumulate(weights[:, None] * values), opacity, depth, depth_variance, weights_out
