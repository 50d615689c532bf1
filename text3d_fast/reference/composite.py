"""Volume rendering of packed samples in plain torch: the oracle for `ops.composite`."""

import torch

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
    # Padding of capacity mode has zero length, so it weighs nothing on whichever ray it claims to be.
    count = ray_offsets[-1]
    real = torch.arange(samples, device=sigma.device) < count
    ids = ray_ids.long()
    optical = torch.where(real, sigma * (t_ends - t_starts), torch.zeros_like(sigma))
    total = torch.cumsum(optical, 0)
    exclusive = total - optical
    start = exclusive.new_zeros(samples)
    if samples:
        start = exclusive[ray_offsets[:-1].long().clamp(max=samples - 1)][ids]
    transmittance = torch.exp(-(exclusive - start))
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
    return accumulate(weights[:, None] * values), opacity, depth, depth_variance, weights
