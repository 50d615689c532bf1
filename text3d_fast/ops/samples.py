"""Packed samples along rays, as `march_rays` makes them and `composite` takes them."""

from dataclasses import dataclass

import torch


@dataclass
class RaySamples:
    """Intervals [t_start, t_end] along rays, packed and sorted by ray. Anyone may build one.

    ray_ids: int32 [S], the ray of each sample
    t_starts, t_ends: float [S], in units of the ray direction's length
    ray_offsets: int32 [R + 1], ray r owns samples ray_offsets[r] to ray_offsets[r + 1]
    In capacity mode S is fixed; samples beyond ray_offsets[-1] are padding: ray 0, zero length.
    """

    ray_ids: torch.Tensor
    t_starts: torch.Tensor
    t_ends: torch.Tensor
    ray_offsets: torch.Tensor

    @property
    def num_rays(self) -> int:
        return self.ray_offsets.shape[0] - 1

    @property
    def num_samples(self) -> int:
        return self.t_starts.shape[0]

    @property
    def t_middles(self) -> torch.Tensor:
        return 0.5 * (self.t_starts + self.t_ends)
